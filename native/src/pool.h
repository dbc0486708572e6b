// Pool is one slab of host memory cut into chunks of equal size: a memfd, mapped shared, every page present.
// Thread safety: after construction everything is constant; who writes which chunk is the caller's bookkeeping.
// Ownership: owns the memfd and its mapping; a Pool outlives every Reader on it.
//
// Page faults cost a cold load more than the disk does, so they are all taken once, here. Huge pages make fewer of
// them, here and in every engine that maps the pool: reserved ones where there are enough, else as many as the kernel
// can put together.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fd.h"
#include "sllm_native.h"

namespace sllm {

inline constexpr uint64_t kAlignment = 4096;  // What O_DIRECT wants of offsets and buffers.
inline constexpr uint64_t kHugePage = 2ull << 20;

// Address space without memory that begins where a huge page may, so that huge pages can be mapped as such.
std::byte* reserve_addresses(uint64_t length);

class Pool {
 public:
  Pool(uint64_t chunk_bytes, uint64_t chunks, unsigned fault_threads, bool lock, sllm_pages pages);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::byte* chunk(uint64_t index) const noexcept { return base_ + index * chunk_bytes_; }
  uint64_t chunk_bytes() const noexcept { return chunk_bytes_; }
  uint64_t chunks() const noexcept { return chunks_; }
  uint64_t huge_bytes() const noexcept { return huge_bytes_; }
  bool locked() const noexcept { return locked_; }
  bool reserved() const noexcept { return reserved_; }
  std::byte* base() const noexcept { return base_; }
  uint64_t size_bytes() const noexcept { return chunk_bytes_ * chunks_; }
  int fd() const noexcept { return fd_.get(); }

 private:
  bool map_reserved();
  void map_ordinary();
  void fault_in(unsigned threads, bool collapse) const;

  const uint64_t chunk_bytes_;
  const uint64_t chunks_;
  Fd fd_;
  std::byte* base_ = nullptr;
  uint64_t huge_bytes_ = 0;
  bool locked_ = false;
  bool reserved_ = false;
};

}  // namespace sllm
