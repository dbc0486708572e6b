// Pool is one slab of host memory cut into chunks of equal size: a memfd, mapped shared, every page present.
// Thread safety: after construction everything is constant; who writes which chunk is the caller's bookkeeping.
// Ownership: owns the memfd and its mapping; a Pool outlives every Reader on it.
//
// Page faults cost a cold load more than the disk does, so they are all taken once, here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fd.h"

namespace sllm {

inline constexpr uint64_t kAlignment = 4096;  // What O_DIRECT wants of offsets and buffers.

class Pool {
 public:
  Pool(uint64_t chunk_bytes, uint64_t chunks, unsigned fault_threads, bool lock);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::byte* chunk(uint64_t index) const noexcept { return base_ + index * chunk_bytes_; }
  uint64_t chunk_bytes() const noexcept { return chunk_bytes_; }
  uint64_t chunks() const noexcept { return chunks_; }
  uint64_t huge_bytes() const noexcept { return huge_bytes_; }
  bool locked() const noexcept { return locked_; }
  int fd() const noexcept { return fd_.get(); }

 private:
  uint64_t size_bytes() const noexcept { return chunk_bytes_ * chunks_; }
  void fault_in(unsigned threads) const;

  const uint64_t chunk_bytes_;
  const uint64_t chunks_;
  Fd fd_;
  std::byte* base_ = nullptr;
  uint64_t huge_bytes_ = 0;
  bool locked_ = false;
};

}  // namespace sllm
