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
#include "meter.h"
#include "ring.h"

namespace sllm {

// A file as it was when it was described.
struct FileIdentity {
  std::string path;
  uint64_t size_bytes = 0;
  int64_t mtime_ns = 0;
  uint64_t inode = 0;
};

// Opens the described file, without O_DIRECT. Throws Error when it is another one now, or can't be opened.
Fd open_described(const FileIdentity& identity);

// Throws Error when the file that is open is not the described one any more.
void check_unchanged(const FileIdentity& identity, int fd);

// How much of a range, from its beginning, is surely in the page cache; all of it where the kernel doesn't tell.
uint64_t cached_prefix(int fd, uint64_t offset, uint64_t length);
// About how much of a whole file is; throws Error where the kernel doesn't tell.
uint64_t cached_bytes(const char* path);

struct BytesRead {
  uint64_t cached = 0;
  uint64_t device = 0;
};

class SourceFile {
 public:
  // `reads` is how often read() will be called: the file is closed with the last one. `ring` may be null.
  SourceFile(FileIdentity identity, uint64_t reads, Ring* ring, Meters& meters)
      : identity_(std::move(identity)), ring_(ring), meters_(meters), reads_left_(reads) {}

  // Reads `length` bytes at `offset` to `target`; both offset and target are aligned, and target has room for `length`
  // rounded up to the alignment. Throws Error when the file is not the described one or can't be read.
  BytesRead read(uint64_t offset, uint64_t length, std::byte* target);

 private:
  void ensure_open();
  uint64_t read_cached(uint64_t offset, uint64_t length, std::byte* target) const;
  uint64_t read_direct(uint64_t offset, uint64_t done, uint64_t length, std::byte* target) const;
  void read_buffered(uint64_t offset, uint64_t done, uint64_t length, std::byte* target) const;

  const FileIdentity identity_;
  Ring* const ring_;  // What direct reads go through; null: pread.
  Meters& meters_;
  std::mutex mutex_;
  Fd buffered_;  // Opened under mutex_, constant until the last chunk is read.
  Fd direct_;    // Likewise; not open where the filesystem refuses O_DIRECT.
  std::atomic<uint64_t> reads_left_;
};

}  // namespace sllm
