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
constexpr uint64_t kProbes = 64;

bool not_offered(int os_error) { return os_error == EINVAL || os_error == EOPNOTSUPP || os_error == ENOSYS; }

// A closed Fd where `flags` are not offered here and `optional` says that this is no error.
Fd open_checked(const FileIdentity& identity, int flags, bool optional) {
  int raw;
  do {
    // O_NONBLOCK: a pipe put in the file's place must not hold a reading thread.
    raw = ::open(identity.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | flags);
  } while (raw < 0 && errno == EINTR);
  if (raw < 0) {
    if (optional && not_offered(errno)) return Fd();
    if (errno == ENOENT || errno == ENOTDIR) throw Error(SLLM_CHANGED, identity.path + " is gone", errno);
    throw Error(SLLM_READ_FAILED, identity.path + " can't be opened", errno);
  }
  Fd fd(raw);
  check_unchanged(identity, fd.get());
  // A regular file may be waited for.
  (void)fcntl(fd.get(), F_SETFL, flags);
  return fd;
}

uint64_t pages_of(uint64_t length) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return (length + page - 1) / page;
}

}  // namespace

void check_unchanged(const FileIdentity& identity, int fd) {
  struct stat found {};
  if (fstat(fd, &found) != 0) throw Error(SLLM_READ_FAILED, identity.path + " can't be examined", errno);
  const auto size = static_cast<uint64_t>(found.st_size);
  if (!S_ISREG(found.st_mode)) throw Error(SLLM_CHANGED, identity.path + " is no longer a regular file");
  if (size != identity.size_bytes)
    throw Error(SLLM_CHANGED, identity.path + " has " + std::to_string(size) + " bytes and had " +
                                  std::to_string(identity.size_bytes) + " when it was registered");
  if (found.st_ino != identity.inode || mtime_ns(found) != identity.mtime_ns)
    throw Error(SLLM_CHANGED, identity.path + " was replaced or rewritten since it was registered");
}

Fd open_described(const FileIdentity& identity) { return open_checked(identity, 0, false); }

// Asking first matters: a RWF_NOWAIT read that meets a page that is not cached starts a readahead before it says
// EAGAIN, and where read_ahead_kb is 8192 the disk would read half of every 16 MiB chunk twice.
uint64_t cached_prefix(int fd, uint64_t offset, uint64_t length) {
  uint64_t at = 0;
  while (at < length) {
    const uint64_t step = std::min(kProbeBytes, length - at);
    CachestatRange range{offset + at, step};
    Cachestat found{};
    if (syscall(kCachestat, fd, &range, &found, 0) != 0) return length;
    if (found.cached_pages < pages_of(step)) break;
    at += step;
  }
  return at;
}

// Asking about every page of a large file takes milliseconds; some 64 places tell nearly as much.
uint64_t cached_bytes(const char* path) {
  const Fd fd(::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat examined {};
  if (!fd.open() || fstat(fd.get(), &examined) != 0)
    throw Error(SLLM_READ_FAILED, std::string(path) + " can't be opened", errno);
  const auto size = static_cast<uint64_t>(examined.st_size);
  const uint64_t stride = std::max(kProbeBytes, size / kProbes);
  uint64_t asked = 0;
  uint64_t cached = 0;
  for (uint64_t at = 0; at < size; at += stride) {
    const uint64_t length = std::min(kProbeBytes, size - at);
    CachestatRange range{at, length};
    Cachestat found{};
    if (syscall(kCachestat, fd.get(), &range, &found, 0) != 0)
      throw Error(SLLM_INVALID, "the kernel does not tell what it has cached", errno);
    asked += pages_of(length);
    cached += std::min(found.cached_pages, pages_of(length));
  }
  if (cached == asked) return size;
  return static_cast<uint64_t>(static_cast<double>(size) * static_cast<double>(cached) / static_cast<double>(asked));
}

BytesRead SourceFile::read(uint64_t offset, uint64_t length, std::byte* target) {
  ensure_open();
  uint64_t cached = 0;
  if (const uint64_t expected = cached_prefix(buffered_.get(), offset, length); expected > 0) {
    Meter::Trip trip(meters_.cached);
    trip.end(cached = read_cached(offset, expected, target));
  }
  if (cached < length) {
    Meter::Trip trip(meters_.storage);
    uint64_t done = cached;
    if (direct_.open()) done = read_direct(offset, done, length, target);
    if (done < length) read_buffered(offset, done, length, target);
    trip.end(length - cached);
  }
  if (reads_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    // Whatever replaced or rewrote the file while it was read has changed one of these.
    check_unchanged(identity_, buffered_.get());
    buffered_.reset();
    direct_.reset();
  }
  return {cached, length - cached};
}

void SourceFile::ensure_open() {
  const std::lock_guard lock(mutex_);
  if (buffered_.open()) return;
  Fd buffered = open_described(identity_);
  direct_ = open_checked(identity_, O_DIRECT, true);
  buffered_ = std::move(buffered);
}

// Takes what the page cache has from `offset` on, without waiting for the device.
uint64_t SourceFile::read_cached(uint64_t offset, uint64_t length, std::byte* target) const {
  const iovec room{target, length};
  for (;;) {
    const ssize_t got = preadv2(buffered_.get(), &room, 1, static_cast<off_t>(offset), RWF_NOWAIT);
    if (got >= 0) return static_cast<uint64_t>(got);
    if (errno == EINTR) continue;
    if (errno == EAGAIN || not_offered(errno)) return 0;
    throw Error(SLLM_READ_FAILED, identity_.path + " can't be read", errno);
  }
}

// Returns how far it came; short of `length` only where the filesystem wants no more direct reads.
uint64_t SourceFile::read_direct(uint64_t offset, uint64_t done, uint64_t length, std::byte* target) const {
  uint64_t at = done / kAlignment * kAlignment;
  while (at < length && at % kAlignment == 0) {
    // The end of a file need not be aligned, but the request must be: it asks for more than there is.
    const uint64_t wanted = (length - at + kAlignment - 1) / kAlignment * kAlignment;
    const auto from = static_cast<off_t>(offset + at);
    ssize_t got = ring_ != nullptr ? ring_->read(direct_.get(), target + at, wanted, offset + at)
                                   : pread(direct_.get(), target + at, wanted, from);
    if (got < 0 && ring_ == nullptr) got = -errno;
    if (got > 0) {
      at += static_cast<uint64_t>(got);
    } else if (got == 0) {
      throw Error(SLLM_CHANGED, identity_.path + " ended while it was read");
    } else if (const int error = static_cast<int>(-got); not_offered(error) || error == EAGAIN) {
      break;  // The buffered read follows, and says what is wrong, if anything is.
    } else if (error != EINTR) {
      throw Error(SLLM_READ_FAILED, identity_.path + " can't be read", error);
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
      throw Error(SLLM_CHANGED, identity_.path + " ended while it was read");
    } else if (errno != EINTR) {
      throw Error(SLLM_READ_FAILED, identity_.path + " can't be read", errno);
    }
  }
}

}  // namespace sllm
