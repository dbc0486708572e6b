// The device part of the C ABI: each function unpacks its arguments and calls one method.
// Thread safety and ownership: as sllm_native.h says.
#include <memory>

#include "abi.h"
#include "cuda_driver.h"
#include "device.h"

using sllm::guarded;

struct sllm_device {
  sllm::Device device;
};

struct sllm_buffer {
  std::unique_ptr<sllm::Buffer> buffer;
};

sllm::Buffer* sllm::buffer_of(sllm_buffer* buffer) { return buffer->buffer.get(); }

extern "C" {

int32_t sllm_device_count(const char* library, int32_t* count, sllm_error* error) {
  return guarded(error, [&] { *count = sllm::cuda::Driver::get(library).device_count(); });
}

sllm_device* sllm_device_open(const char* library, int32_t ordinal, uint32_t streams, sllm_error* error) {
  sllm_device* device = nullptr;
  guarded(error, [&] { device = new sllm_device{sllm::Device(library, ordinal, streams)}; });
  return device;
}

int32_t sllm_device_get_facts(sllm_device* device, sllm_device_facts* facts, sllm_error* error) {
  return guarded(error, [&] { device->device.describe(*facts); });
}

int32_t sllm_device_register(sllm_device* device, sllm_pool* pool, sllm_error* error) {
  return guarded(error, [&] { device->device.register_pool(pool->pool); });
}

int32_t sllm_device_unregister(sllm_device* device, sllm_pool* pool, sllm_error* error) {
  return guarded(error, [&] { device->device.unregister_pool(pool->pool); });
}

void sllm_device_close(sllm_device* device) { delete device; }

sllm_buffer* sllm_buffer_create(sllm_device* device, uint64_t size_bytes, sllm_error* error) {
  sllm_buffer* buffer = nullptr;
  guarded(error, [&] { buffer = new sllm_buffer{sllm::Buffer::create(device->device, size_bytes)}; });
  return buffer;
}

int32_t sllm_buffer_export(sllm_buffer* buffer, uint8_t* handle, sllm_error* error) {
  return guarded(error, [&] { buffer->buffer->export_to(handle); });
}

sllm_buffer* sllm_buffer_open(sllm_device* device, const uint8_t* handle, uint64_t size_bytes, sllm_error* error) {
  sllm_buffer* buffer = nullptr;
  guarded(error, [&] { buffer = new sllm_buffer{sllm::Buffer::open(device->device, handle, size_bytes)}; });
  return buffer;
}

uint64_t sllm_buffer_address(const sllm_buffer* buffer) { return buffer->buffer->address(); }

int32_t sllm_buffer_read(sllm_buffer* buffer, uint64_t offset, uint64_t length, void* target, sllm_error* error) {
  return guarded(error, [&] { buffer->buffer->read(offset, length, target); });
}

void sllm_buffer_destroy(sllm_buffer* buffer) { delete buffer; }

}  // extern "C"
