// SourceFile reads one described file, chunk by chunk, in any order.
// Thread safety: read() from any thread at once; it opens the file on first use. Ownership: owns its descriptors, and
// closes them as soon as the last byte is read, or when destroyed.
//
// What the page cache holds from a chunk's beginning on is taken from there (RWF_NOWAIT); the rest is read with
// O_DIRECT, which spares the CPU a copy and the cache a model; a filesystem without O_DIRECT is read through the cache.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "fd.h"

namespace sllm {

struct FilePlan {
  std::string path;
  uint64_t size_bytes;
  int64_t mtime_ns;
  uint64_t inode;
  std::vector<uint64_t> chunks;  // Where each chunk of the file goes in the pool.
};

struct BytesRead {
  uint64_t cached = 0;
  uint64_t device = 0;
};

class SourceFile {
 public:
  explicit SourceFile(FilePlan plan) : plan_(std::move(plan)), chunks_left_(plan_.chunks.size()) {}

  const FilePlan& plan() const noexcept { return plan_; }
  // Reads `length` bytes at `offset` to `target`; both offset and target are aligned, and target has room for `length`
  // rounded up to the alignment. Throws Error when the file is not the described one or can't be read.
  BytesRead read(uint64_t offset, uint64_t length, std::byte* target);

 private:
  void ensure_open();
  Fd open_checked(int flags, bool optional) const;
  void check_unchanged(int fd) const;
  uint64_t read_cached(uint64_t offset, uint64_t length, std::byte* target) const;
  uint64_t read_direct(uint64_t offset, uint64_t done, uint64_t length, std::byte* target) const;
  void read_buffered(uint64_t offset, uint64_t done, uint64_t length, std::byte* target) const;

  const FilePlan plan_;
  std::mutex mutex_;
  Fd buffered_;  // Opened under mutex_, constant until the last chunk is read.
  Fd direct_;    // Likewise; not open where the filesystem refuses O_DIRECT.
  std::atomic<uint64_t> chunks_left_;
};

}  // namespace sllm
