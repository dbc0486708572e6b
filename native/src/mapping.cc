#include "mapping.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

#include "error.h"
#include "pool.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace sllm {
namespace {

constexpr uint64_t kPopulateStep = 32ull << 20;
constexpr unsigned kMaxThreads = 64;

void check_inside(int fd, uint64_t chunk_bytes, std::span<const uint64_t> chunks) {
  struct stat found {};
  if (fstat(fd, &found) != 0) throw Error(SLLM_INVALID, "the pool's descriptor", errno);
  if (chunk_bytes == 0 || chunks.empty()) throw Error(SLLM_INVALID, "nothing to map");
  const uint64_t there = static_cast<uint64_t>(found.st_size) / chunk_bytes;
  // A page outside the pool would be SIGBUS at the first touch.
  if (*std::max_element(chunks.begin(), chunks.end()) >= there)
    throw Error(SLLM_INVALID, "a chunk lies outside the pool");
}

void map_at(std::byte* address, uint64_t length, int fd, uint64_t offset) {
  const void* mapped = mmap(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd,
                            static_cast<off_t>(offset));
  if (mapped == MAP_FAILED) throw Error(SLLM_NO_MEMORY, "mapping", errno);
}

// Not MAP_POPULATE: on a private writable mapping that would copy every page. Returns 0, or why a page can't be had.
int populate_part(std::byte* begin, uint64_t length) {
  while (madvise(begin, length, MADV_POPULATE_READ) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    return errno == EINVAL ? 0 : errno;  // A kernel before 5.14 does not know it, and faults pages in as they are read.
  }
  return 0;
}

int populate_range(std::byte* base, uint64_t length, unsigned threads) {
  const uint64_t steps = (length + kPopulateStep - 1) / kPopulateStep;
  const auto workers = static_cast<unsigned>(std::min<uint64_t>({threads, kMaxThreads, steps}));
  std::atomic<int> error{0};
  std::vector<std::jthread> running;
  for (unsigned k = 0; k < workers; ++k) {
    auto work = [=, &error] {
      for (uint64_t step = k; step < steps && error == 0; step += workers) {
        const uint64_t at = step * kPopulateStep;
        if (const int failed = populate_part(base + at, std::min(kPopulateStep, length - at)); failed != 0)
          error = failed;
      }
    };
    if (k + 1 < workers)
      running.emplace_back(work);
    else
      work();
  }
  running.clear();
  return error;
}

// A page that the kernel can't read from its file is EFAULT here, and would be SIGBUS at its first touch.
void populate_file(const FileIdentity& identity, int fd, std::byte* base, unsigned threads) {
  const int error = populate_range(base, identity.size_bytes, threads);
  if (error == 0) return;
  if (error == ENOMEM) throw Error(SLLM_NO_MEMORY, "mapping " + identity.path, error);
  check_unchanged(identity, fd);
  throw Error(SLLM_READ_FAILED, identity.path + " can't be read, the kernel could not map all of it", error);
}

}  // namespace

void* map_chunks(int fd, uint64_t chunk_bytes, std::span<const uint64_t> chunks, unsigned populate) {
  check_inside(fd, chunk_bytes, chunks);
  const uint64_t length = chunk_bytes * chunks.size();
  std::byte* base = reserve_addresses(length);
  try {
    for (std::size_t at = 0; at < chunks.size();) {
      // Neighbours in the pool become one mapping: the kernel's count of mappings is limited.
      std::size_t run = 1;
      while (at + run < chunks.size() && chunks[at + run] == chunks[at] + run) ++run;
      map_at(base + at * chunk_bytes, run * chunk_bytes, fd, chunks[at] * chunk_bytes);
      at += run;
    }
    (void)madvise(base, length, MADV_HUGEPAGE);
    if (const int error = populate_range(base, length, populate); error != 0)
      throw Error(SLLM_NO_MEMORY, "mapping the pool's pages", error);
  } catch (...) {
    munmap(base, length);
    throw;
  }
  return base;
}

void* map_file(const FileIdentity& identity, unsigned populate) {
  if (identity.size_bytes == 0) throw Error(SLLM_INVALID, identity.path + " has no bytes to map");
  const Fd fd = open_described(identity);
  std::byte* base = reserve_addresses(identity.size_bytes);
  try {
    map_at(base, identity.size_bytes, fd.get(), 0);
    (void)madvise(base, identity.size_bytes, MADV_HUGEPAGE);
    populate_file(identity, fd.get(), base, populate);
  } catch (...) {
    munmap(base, identity.size_bytes);
    throw;
  }
  return base;
}

void unmap(void* address, uint64_t length_bytes) {
  if (munmap(address, length_bytes) != 0) throw Error(SLLM_INVALID, "unmapping", errno);
}

}  // namespace sllm
