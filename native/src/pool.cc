#include "pool.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "error.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif

namespace sllm {
namespace {

constexpr uint64_t kFaultStepBytes = 64ull << 20;
// Where memory is in pieces, each refusal has cost the kernel a search.
constexpr unsigned kMaxRefusals = 8;

uint64_t up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

void touch(std::byte* begin, uint64_t length) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  for (uint64_t at = 0; at < length; at += page) *reinterpret_cast<volatile std::byte*>(begin + at) = std::byte{0};
}

// Kernels before 5.14 do not know MADV_POPULATE_WRITE; there every page is touched.
void fault_range(std::byte* begin, uint64_t length) {
  while (madvise(begin, length, MADV_POPULATE_WRITE) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) throw Error(SLLM_NO_MEMORY, "host pool: its pages cannot be had", errno);
    touch(begin, length);
    return;
  }
}

// Makes a huge page of each that is wanted, whatever the machine's settings for shared memory are (Linux 6.1). Such a
// page is one piece of memory for the disk, too, where small ones lie scattered.
void collapse_range(std::byte* begin, uint64_t length, std::atomic<unsigned>& refusals) {
  for (uint64_t at = 0; at + kHugePage <= length && refusals < kMaxRefusals; at += kHugePage) {
    touch(begin + at, 1);  // What has no page at all is refused.
    if (madvise(begin + at, kHugePage, MADV_COLLAPSE) == 0) continue;
    // The kernel does not know it, or never does it for this memory; else there is no such piece just now.
    refusals += errno == EINVAL ? kMaxRefusals : 1;
  }
}

// MADV_HUGEPAGE always answers yes; only smaps knows what was given.
uint64_t huge_bytes_at(const std::byte* base) {
  std::ostringstream start;
  start << std::hex << reinterpret_cast<uintptr_t>(base) << '-';
  std::ifstream smaps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    if (line.rfind(start.str(), 0) == 0) inside = true;
    uint64_t kib = 0;
    if (inside && std::sscanf(line.c_str(), "ShmemPmdMapped: %lu kB", &kib) == 1) return kib * 1024;
  }
  return 0;
}

void seal(const Fd& fd) {
  // A pool that cannot shrink cannot raise SIGBUS in an engine that maps it.
  if (fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    throw Error(SLLM_NO_MEMORY, "host pool: sealing", errno);
}

}  // namespace

std::byte* reserve_addresses(uint64_t length) {
  const uint64_t room = length + kHugePage;
  void* reserved = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) throw Error(SLLM_NO_MEMORY, "reserving address space", errno);
  auto* begin = static_cast<std::byte*>(reserved);
  auto* base = reinterpret_cast<std::byte*>(up(reinterpret_cast<uintptr_t>(begin), kHugePage));
  const uint64_t end = up(length, static_cast<uint64_t>(sysconf(_SC_PAGESIZE)));
  if (base > begin) munmap(begin, static_cast<std::size_t>(base - begin));
  munmap(base + end, room - end - static_cast<std::size_t>(base - begin));
  return base;
}

Pool::Pool(uint64_t chunk_bytes, uint64_t chunks, unsigned fault_threads, bool lock, sllm_pages pages)
    : chunk_bytes_(chunk_bytes), chunks_(chunks) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (chunk_bytes == 0 || chunk_bytes % std::max(kAlignment, page) != 0)
    throw Error(SLLM_INVALID, "host pool: chunk_bytes must be a multiple of the page size");
  if (chunks == 0 || chunks > (uint64_t{1} << 62) / chunk_bytes || fault_threads == 0)
    throw Error(SLLM_INVALID, "host pool: the number of chunks or of threads is out of bounds");
  reserved_ = pages == SLLM_HUGE_PAGES && map_reserved();
  if (!reserved_) map_ordinary();
  try {
    const bool collapse = pages == SLLM_HUGE_PAGES && !reserved_;
    if (collapse) madvise(base_, size_bytes(), MADV_HUGEPAGE);
    fault_in(fault_threads, collapse);
    locked_ = lock && mlock(base_, size_bytes()) == 0;
    huge_bytes_ = reserved_ ? size_bytes() : huge_bytes_at(base_);
  } catch (...) {
    munmap(base_, size_bytes());
    throw;
  }
}

Pool::~Pool() { munmap(base_, size_bytes()); }

// Takes reserved huge pages, all or none: the kernel sets them aside at mmap, so that no later fault can find none.
bool Pool::map_reserved() {
  if (chunk_bytes_ % kHugePage != 0) return false;
  Fd fd(memfd_create("sllm-host-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB | MFD_HUGE_2MB));
  if (!fd.open() || ftruncate(fd.get(), static_cast<off_t>(size_bytes())) != 0) return false;
  seal(fd);
  void* mapped = mmap(nullptr, size_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (mapped == MAP_FAILED) return false;
  base_ = static_cast<std::byte*>(mapped);
  fd_ = std::move(fd);
  return true;
}

void Pool::map_ordinary() {
  Fd fd(memfd_create("sllm-host-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.open()) throw Error(SLLM_NO_MEMORY, "host pool: memfd_create", errno);
  if (ftruncate(fd.get(), static_cast<off_t>(size_bytes())) != 0)
    throw Error(SLLM_NO_MEMORY, "host pool: ftruncate", errno);
  seal(fd);
  std::byte* reserved = reserve_addresses(size_bytes());
  if (mmap(reserved, size_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd.get(), 0) == MAP_FAILED) {
    const int why = errno;
    munmap(reserved, size_bytes());
    throw Error(SLLM_NO_MEMORY, "host pool: mmap", why);
  }
  base_ = reserved;
  fd_ = std::move(fd);
}

void Pool::fault_in(unsigned threads, bool collapse) const {
  std::atomic<uint64_t> next{0};
  std::atomic<unsigned> refusals{0};
  std::vector<std::exception_ptr> failures(threads);
  std::vector<std::jthread> workers;
  for (unsigned k = 0; k < threads; ++k) {
    workers.emplace_back([this, collapse, &next, &refusals, &failure = failures[k]] {
      try {
        for (uint64_t at; (at = next.fetch_add(kFaultStepBytes)) < size_bytes();) {
          const uint64_t length = std::min(kFaultStepBytes, size_bytes() - at);
          if (collapse) collapse_range(base_ + at, length, refusals);
          fault_range(base_ + at, length);
        }
      } catch (...) {
        failure = std::current_exception();
      }
    });
  }
  workers.clear();
  for (const auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace sllm
