// The C ABI: each function unpacks its arguments, calls one method, and turns an exception into a code and a message.
// Thread safety and ownership: as sllm_native.h says.
#include "sllm_native.h"

#include <cstring>
#include <new>
#include <span>
#include <utility>

#include "error.h"
#include "mapping.h"
#include "pool.h"
#include "reader.h"

struct sllm_pool {
  sllm::Pool pool;
};

struct sllm_reader {
  sllm::Reader reader;
};

namespace {

int32_t report(sllm_error* error, sllm_code code, int os_error, const char* message) noexcept {
  if (error != nullptr) {
    *error = {};
    error->code = code;
    error->os_error = os_error;
    std::strncpy(error->message, message, SLLM_MESSAGE_BYTES - 1);
  }
  return code;
}

template <typename Body>
int32_t guarded(sllm_error* error, Body&& body) noexcept {
  try {
    body();
    return SLLM_OK;
  } catch (const sllm::Error& caught) {
    return report(error, caught.code(), caught.os_error(), caught.what());
  } catch (const std::bad_alloc&) {
    return report(error, SLLM_NO_MEMORY, 0, "out of memory");
  } catch (const std::exception& caught) {
    return report(error, SLLM_INTERNAL, 0, caught.what());
  } catch (...) {
    return report(error, SLLM_INTERNAL, 0, "unknown exception");
  }
}

std::vector<sllm::FilePlan> plans(const sllm_file* files, uint64_t file_count) {
  std::vector<sllm::FilePlan> result;
  for (const sllm_file& file : std::span(files, file_count))
    result.push_back({file.path, file.size_bytes, file.mtime_ns, file.inode,
                      std::vector<uint64_t>(file.chunks, file.chunks + file.chunk_count)});
  return result;
}

}  // namespace

extern "C" {

uint32_t sllm_abi_version(void) { return SLLM_ABI_VERSION; }

sllm_pool* sllm_pool_create(uint64_t chunk_bytes, uint64_t chunks, uint32_t fault_threads, int32_t lock,
                            sllm_error* error) {
  sllm_pool* pool = nullptr;
  guarded(error, [&] { pool = new sllm_pool{sllm::Pool(chunk_bytes, chunks, fault_threads, lock != 0)}; });
  return pool;
}

void sllm_pool_get_facts(const sllm_pool* pool, sllm_pool_facts* facts) {
  const sllm::Pool& from = pool->pool;
  *facts = {from.fd(), from.locked() ? 1 : 0, from.chunk_bytes(), from.chunks(), from.huge_bytes()};
}

void sllm_pool_destroy(sllm_pool* pool) { delete pool; }

sllm_reader* sllm_reader_create(sllm_pool* pool, uint32_t threads, uint32_t max_loads, sllm_error* error) {
  sllm_reader* reader = nullptr;
  guarded(error, [&] { reader = new sllm_reader{sllm::Reader(pool->pool, threads, max_loads)}; });
  return reader;
}

int32_t sllm_reader_event_fd(const sllm_reader* reader) { return reader->reader.event_fd(); }

int32_t sllm_reader_submit(sllm_reader* reader, const sllm_file* files, uint64_t file_count, uint64_t* load_id,
                           sllm_error* error) {
  return guarded(error, [&] { *load_id = reader->reader.submit(plans(files, file_count)); });
}

int32_t sllm_reader_status(sllm_reader* reader, uint64_t load_id, sllm_load_status* status, sllm_error* error) {
  return guarded(error, [&] { reader->reader.status(load_id, *status); });
}

int32_t sllm_reader_cancel(sllm_reader* reader, uint64_t load_id, sllm_error* error) {
  return guarded(error, [&] { reader->reader.cancel(load_id); });
}

int32_t sllm_reader_forget(sllm_reader* reader, uint64_t load_id, sllm_error* error) {
  return guarded(error, [&] { reader->reader.forget(load_id); });
}

void sllm_reader_destroy(sllm_reader* reader) { delete reader; }

int32_t sllm_map_chunks(int32_t fd, uint64_t chunk_bytes, const uint64_t* chunks, uint64_t chunk_count,
                        int32_t populate, void** address, sllm_error* error) {
  return guarded(
      error, [&] { *address = sllm::map_chunks(fd, chunk_bytes, std::span(chunks, chunk_count), populate != 0); });
}

int32_t sllm_unmap(void* address, uint64_t length_bytes, sllm_error* error) {
  return guarded(error, [&] { sllm::unmap(address, length_bytes); });
}

}  // extern "C"
