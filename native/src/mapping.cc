#include "mapping.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstddef>

#include "error.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace sllm {
namespace {

void check_inside(int fd, uint64_t chunk_bytes, std::span<const uint64_t> chunks) {
  struct stat found {};
  if (fstat(fd, &found) != 0) throw Error(SLLM_INVALID, "the pool's descriptor", errno);
  if (chunk_bytes == 0 || chunks.empty()) throw Error(SLLM_INVALID, "nothing to map");
  const uint64_t there = static_cast<uint64_t>(found.st_size) / chunk_bytes;
  // A page outside the pool would be SIGBUS at the first touch.
  if (*std::max_element(chunks.begin(), chunks.end()) >= there)
    throw Error(SLLM_INVALID, "a chunk lies outside the pool");
}

}  // namespace

void* map_chunks(int fd, uint64_t chunk_bytes, std::span<const uint64_t> chunks, bool populate) {
  check_inside(fd, chunk_bytes, chunks);
  const uint64_t length = chunk_bytes * chunks.size();
  void* reserved = mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) throw Error(SLLM_NO_MEMORY, "reserving address space", errno);
  auto* base = static_cast<std::byte*>(reserved);
  for (std::size_t at = 0; at < chunks.size();) {
    // Neighbours in the pool become one mapping: the kernel's count of mappings is limited.
    std::size_t run = 1;
    while (at + run < chunks.size() && chunks[at + run] == chunks[at] + run) ++run;
    const void* mapped =
        mmap(base + at * chunk_bytes, run * chunk_bytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, static_cast<off_t>(chunks[at] * chunk_bytes));
    if (mapped == MAP_FAILED) {
      const int os_error = errno;
      munmap(reserved, length);
      throw Error(SLLM_NO_MEMORY, "mapping chunks", os_error);
    }
    at += run;
  }
  // Not MAP_POPULATE: on a private writable mapping that would copy every page. Only a saving, so its answer is not
  // needed: an older kernel faults pages in as they are read.
  if (populate) (void)madvise(reserved, length, MADV_POPULATE_READ);
  return reserved;
}

void unmap(void* address, uint64_t length_bytes) {
  if (munmap(address, length_bytes) != 0) throw Error(SLLM_INVALID, "unmapping", errno);
}

}  // namespace sllm
