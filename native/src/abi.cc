// The C ABI: each function unpacks its arguments, calls one method, and turns an exception into a code and a message.
// Thread safety and ownership: as sllm_native.h says.
#include "sllm_native.h"

#include <span>
#include <utility>
#include <vector>

#include "abi.h"
#include "device.h"
#include "mapping.h"
#include "reader.h"
#include "xxh3.h"

struct sllm_reader {
  sllm::Reader reader;
};

namespace {

using sllm::guarded;

std::vector<uint64_t> indexes(const uint64_t* chunks, uint64_t count) {
  return count == 0 ? std::vector<uint64_t>() : std::vector<uint64_t>(chunks, chunks + count);
}

sllm::LoadPlan plan_of(const sllm_file* files, uint64_t file_count, const sllm_load_options& options) {
  sllm::LoadPlan plan;
  for (const sllm_file& from : std::span(files, file_count)) {
    sllm::FilePlan file;
    file.identity = {from.path, from.size_bytes, from.mtime_ns, from.inode};
    file.chunks = indexes(from.chunks, from.chunk_count);
    if (from.digests != nullptr) file.digests.assign(from.digests, from.digests + 16 * from.digest_count);
    file.target = from.target == nullptr ? nullptr : sllm::buffer_of(from.target);
    file.target_offset = from.target_offset;
    plan.files.push_back(std::move(file));
  }
  plan.priority = options.priority;
  plan.resident = options.resident != 0;
  plan.digest_bytes = options.digest_bytes;
  plan.window = indexes(options.window, options.window_count);
  return plan;
}

}  // namespace

extern "C" {

uint32_t sllm_abi_version(void) { return SLLM_ABI_VERSION; }

void sllm_digest(const void* data, uint64_t length, uint8_t* digest) { sllm::xxh3_128(data, length, digest); }

sllm_pool* sllm_pool_create(uint64_t chunk_bytes, uint64_t chunks, uint32_t fault_threads, int32_t lock,
                            int32_t pages, sllm_error* error) {
  sllm_pool* pool = nullptr;
  guarded(error, [&] {
    const auto wanted = pages == SLLM_HUGE_PAGES ? SLLM_HUGE_PAGES : SLLM_SMALL_PAGES;
    pool = new sllm_pool{sllm::Pool(chunk_bytes, chunks, fault_threads, lock != 0, wanted)};
  });
  return pool;
}

void sllm_pool_get_facts(const sllm_pool* pool, sllm_pool_facts* facts) {
  const sllm::Pool& from = pool->pool;
  *facts = {from.fd(),     from.locked() ? 1 : 0, from.reserved() ? 1 : 0, from.chunk_bytes(),
            from.chunks(), from.huge_bytes()};
}

void sllm_pool_destroy(sllm_pool* pool) { delete pool; }

sllm_reader* sllm_reader_create(sllm_pool* pool, uint32_t threads, uint32_t max_loads, int32_t io_uring,
                                sllm_error* error) {
  sllm_reader* reader = nullptr;
  guarded(error, [&] { reader = new sllm_reader{sllm::Reader(pool->pool, threads, max_loads, io_uring != 0)}; });
  return reader;
}

int32_t sllm_reader_event_fd(const sllm_reader* reader) { return reader->reader.event_fd(); }

int32_t sllm_reader_submit(sllm_reader* reader, const sllm_file* files, uint64_t file_count,
                           const sllm_load_options* options, uint64_t* load_id, sllm_error* error) {
  return guarded(error, [&] { *load_id = reader->reader.submit(plan_of(files, file_count, *options)); });
}

int32_t sllm_reader_status(sllm_reader* reader, uint64_t load_id, sllm_load_status* status, sllm_error* error) {
  return guarded(error, [&] { reader->reader.status(load_id, *status); });
}

int32_t sllm_reader_set_priority(sllm_reader* reader, uint64_t load_id, int32_t priority, sllm_error* error) {
  return guarded(error, [&] { reader->reader.set_priority(load_id, priority); });
}

int32_t sllm_reader_drop_targets(sllm_reader* reader, uint64_t load_id, sllm_error* error) {
  return guarded(error, [&] { reader->reader.drop_targets(load_id); });
}

int32_t sllm_reader_cancel(sllm_reader* reader, uint64_t load_id, sllm_error* error) {
  return guarded(error, [&] { reader->reader.cancel(load_id); });
}

int32_t sllm_reader_forget(sllm_reader* reader, uint64_t load_id, sllm_error* error) {
  return guarded(error, [&] { reader->reader.forget(load_id); });
}

void sllm_reader_get_facts(sllm_reader* reader, sllm_reader_facts* facts) { *facts = reader->reader.facts(); }

void sllm_reader_destroy(sllm_reader* reader) { delete reader; }

int32_t sllm_map_chunks(int32_t fd, uint64_t chunk_bytes, const uint64_t* chunks, uint64_t chunk_count,
                        uint32_t populate, void** address, sllm_error* error) {
  return guarded(error,
                 [&] { *address = sllm::map_chunks(fd, chunk_bytes, std::span(chunks, chunk_count), populate); });
}

int32_t sllm_map_file(const char* path, uint64_t size_bytes, int64_t mtime_ns, uint64_t inode, uint32_t populate,
                      void** address, sllm_error* error) {
  return guarded(error, [&] { *address = sllm::map_file({path, size_bytes, mtime_ns, inode}, populate); });
}

int32_t sllm_cached_bytes(const char* path, uint64_t* cached_bytes, sllm_error* error) {
  return guarded(error, [&] { *cached_bytes = sllm::cached_bytes(path); });
}

int32_t sllm_unmap(void* address, uint64_t length_bytes, sllm_error* error) {
  return guarded(error, [&] { sllm::unmap(address, length_bytes); });
}

}  // extern "C"
