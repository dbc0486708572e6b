#include "source_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <algorithm>

#include "error.h"
#include "pool.h"

namespace sllm {
namespace {

int64_t mtime_ns(const struct stat& found) {
  return static_cast<int64_t>(found.st_mtim.tv_sec) * 1'000'000'000 + found.st_mtim.tv_nsec;
}

// cachestat(2) is Linux 6.5; older headers know neither its number nor its structures.
constexpr long kCachestat = 451;
struct CachestatRange {
  uint64_t offset;
  uint64_t length;
};
struct Cachestat {
  uint64_t cached_pages, dirty, writeback, evicted, recently_evicted;
};
constexpr uint64_t kProbeBytes = 1 << 20;

// How much of a range, from its beginning, is surely cached; all of it where the kernel doesn't tell.
//
// Asking first matters: a RWF_NOWAIT read that meets a page that is not cached starts a readahead before it says
// EAGAIN, and where read_ahead_kb is 8192 the disk would read half of every 16 MiB chunk twice.
uint64_t cached_prefix(int fd, uint64_t offset, uint64_t length) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t at = 0;
  while (at < length) {
    const uint64_t step = std::min(kProbeBytes, length - at);
    CachestatRange range{offset + at, step};
    Cachestat found{};
    if (syscall(kCachestat, fd, &range, &found, 0) != 0) return length;
    if (found.cached_pages < (step + page - 1) / page) break;
    at += step;
  }
  return at;
}

bool not_offered(int os_error) { return os_error == EINVAL || os_error == EOPNOTSUPP || os_error == ENOSYS; }

}  // namespace

BytesRead SourceFile::read(uint64_t offset, uint64_t length, std::byte* target) {
  ensure_open();
  const uint64_t cached = read_cached(offset, length, target);
  uint64_t done = cached;
  if (done < length && direct_.open()) done = read_direct(offset, done, length, target);
  if (done < length) read_buffered(offset, done, length, target);
  if (chunks_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    // Whatever replaced or rewrote the file while it was read has changed one of these.
    check_unchanged(buffered_.get());
    buffered_.reset();
    direct_.reset();
  }
  return {cached, length - cached};
}

void SourceFile::ensure_open() {
  const std::lock_guard lock(mutex_);
  if (buffered_.open()) return;
  Fd buffered = open_checked(0, false);
  direct_ = open_checked(O_DIRECT, true);
  buffered_ = std::move(buffered);
}

Fd SourceFile::open_checked(int flags, bool optional) const {
  int raw;
  do {
    // O_NONBLOCK: a pipe put in the file's place must not hold a reading thread.
    raw = ::open(plan_.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags);
  } while (raw < 0 && errno == EINTR);
  if (raw < 0) {
    if (optional && not_offered(errno)) return Fd();
    if (errno == ENOENT || errno == ENOTDIR) throw Error(SLLM_CHANGED, plan_.path + " is gone", errno);
    throw Error(SLLM_READ_FAILED, plan_.path + " can't be opened", errno);
  }
  Fd fd(raw);
  check_unchanged(fd.get());
  return fd;
}

void SourceFile::check_unchanged(int fd) const {
  struct stat found {};
  if (fstat(fd, &found) != 0) throw Error(SLLM_READ_FAILED, plan_.path + " can't be examined", errno);
  const auto size = static_cast<uint64_t>(found.st_size);
  if (!S_ISREG(found.st_mode)) throw Error(SLLM_CHANGED, plan_.path + " is no longer a regular file");
  if (size != plan_.size_bytes)
    throw Error(SLLM_CHANGED, plan_.path + " has " + std::to_string(size) + " bytes and had " +
                                  std::to_string(plan_.size_bytes) + " when it was registered");
  if (found.st_ino != plan_.inode || mtime_ns(found) != plan_.mtime_ns)
    throw Error(SLLM_CHANGED, plan_.path + " was replaced or rewritten since it was registered");
}

// Takes what the page cache has from `offset` on, without waiting for the device.
uint64_t SourceFile::read_cached(uint64_t offset, uint64_t length, std::byte* target) const {
  const iovec room{target, cached_prefix(buffered_.get(), offset, length)};
  while (room.iov_len > 0) {
    const ssize_t got = preadv2(buffered_.get(), &room, 1, static_cast<off_t>(offset), RWF_NOWAIT);
    if (got >= 0) return static_cast<uint64_t>(got);
    if (errno == EINTR) continue;
    if (errno == EAGAIN || not_offered(errno)) return 0;
    throw Error(SLLM_READ_FAILED, plan_.path + " can't be read", errno);
  }
  return 0;
}

// Returns how far it came; short of `length` only where the filesystem wants no more direct reads.
uint64_t SourceFile::read_direct(uint64_t offset, uint64_t done, uint64_t length, std::byte* target) const {
  uint64_t at = done / kAlignment * kAlignment;
  while (at < length && at % kAlignment == 0) {
    // The end of a file need not be aligned, but the request must be: it asks for more than there is.
    const uint64_t wanted = (length - at + kAlignment - 1) / kAlignment * kAlignment;
    const ssize_t got = pread(direct_.get(), target + at, wanted, static_cast<off_t>(offset + at));
    if (got > 0) {
      at += static_cast<uint64_t>(got);
    } else if (got == 0) {
      throw Error(SLLM_CHANGED, plan_.path + " ended while it was read");
    } else if (not_offered(errno)) {
      break;
    } else if (errno != EINTR) {
      throw Error(SLLM_READ_FAILED, plan_.path + " can't be read", errno);
    }
  }
  return std::min(at, length);
}

void SourceFile::read_buffered(uint64_t offset, uint64_t done, uint64_t length, std::byte* target) const {
  while (done < length) {
    const ssize_t got = pread(buffered_.get(), target + done, length - done, static_cast<off_t>(offset + done));
    if (got > 0) {
      done += static_cast<uint64_t>(got);
    } else if (got == 0) {
      throw Error(SLLM_CHANGED, plan_.path + " ended while it was read");
    } else if (errno != EINTR) {
      throw Error(SLLM_READ_FAILED, plan_.path + " can't be read", errno);
    }
  }
}

}  // namespace sllm
