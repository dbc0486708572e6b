// fault_shim stands between a process and its files (LD_PRELOAD), and makes of the disk what a test wants of it.
//
// SLLM_FAULT_PATH   What the path of a file must contain for the shim to look at it.
// SLLM_FAULT_RULES  CALL:WHEN:WHAT, several of them with spaces between; the first that fits a call has effect.
//   CALL  open, open_direct (O_DIRECT), fstat, nowait (a read with RWF_NOWAIT), buffered, direct; read: the last two;
//         populate: madvise(MADV_POPULATE_READ) on a mapping of the file; ring: a read by io_uring, of which only
//         fail=EIO can be asked.
//   WHEN  which of those calls, counted from 1: "3", "3-5", "3-" (and all after it).
//   WHAT  fail=ERRNO; short=SEED: fewer bytes than there are, and rubbish where the others would be; end: no bytes;
//         truncate=BYTES, rewrite, replace, unlink: this happens to the file just before the call, which then goes on.
// SLLM_FAULT_COUNTS A file, to which the counts of the calls are mapped: ten uint64, the last that of the effects.
// SLLM_FAULT_DISARMED=1: the shim does nothing until the process calls fault_shim_arm(1).
// A process that is forked from one that is warm calls fault_shim_set_up, which reads these variables anew.
//
// Thread safety: everything is set up before a second thread is, but for the counts and the switch, which are atomic.
// Ownership: the mapping of the counts lives as long as the process.
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

enum Call { kOpen, kOpenDirect, kFstat, kNowait, kBuffered, kDirect, kRing, kRead, kPopulate, kEffects, kCalls };
constexpr const char* kCallNames[kEffects] = {"open",     "open_direct", "fstat", "nowait",
                                              "buffered", "direct",      "ring",  "read",   "populate"};
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

enum class What { kNothing, kFail, kShort, kEnd, kTruncate, kRewrite, kReplace, kUnlink };
constexpr const char* kWhatNames[] = {"", "fail", "short", "end", "truncate", "rewrite", "replace", "unlink"};

struct Rule {
  Call call = kOpen;
  uint64_t first = 1;
  uint64_t last = UINT64_MAX;
  What what = What::kNothing;
  uint64_t value = 0;
};

template <typename Function>
Function* real(const char* name) {
  auto* found = reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
  if (found == nullptr) {
    std::fprintf(stderr, "fault_shim: this libc has no %s\n", name);
    std::abort();
  }
  return found;
}

template <std::size_t N>
int index_of(const std::string& name, const char* const (&names)[N]) {
  for (std::size_t k = 0; k < N; ++k)
    if (name == names[k]) return static_cast<int>(k);
  std::fprintf(stderr, "fault_shim: what is \"%s\"?\n", name.c_str());
  std::abort();
}

Rule parsed(const std::string& text) {
  std::istringstream parts(text);
  std::string call, when, what, value;
  std::getline(parts, call, ':');
  std::getline(parts, when, ':');
  std::getline(parts, what, '=');
  std::getline(parts, value);
  Rule rule;
  rule.call = static_cast<Call>(index_of(call, kCallNames));
  rule.what = static_cast<What>(index_of(what, kWhatNames));
  const std::size_t dash = when.find('-');
  rule.first = std::stoull(when);
  if (dash == std::string::npos) rule.last = rule.first;
  else if (dash + 1 < when.size()) rule.last = std::stoull(when.substr(dash + 1));
  rule.value = value.empty() ? 0 : std::stoull(value);
  if (rule.call == kRing && (rule.what != What::kFail || rule.value != EIO)) {
    std::fprintf(stderr, "fault_shim: a read by io_uring can only be made to fail with EIO\n");
    std::abort();
  }
  return rule;
}

class Shim {
 public:
  Shim() { set_up(); }

  void set_up() {
    const char* path = std::getenv("SLLM_FAULT_PATH");
    const char* rules = std::getenv("SLLM_FAULT_RULES");
    const char* counts = std::getenv("SLLM_FAULT_COUNTS");
    if (path == nullptr || counts == nullptr) return;
    path_ = path;
    rules_.clear();
    std::istringstream texts(rules == nullptr ? "" : rules);
    for (std::string text; texts >> text;) rules_.push_back(parsed(text));
    const int fd = real<int(const char*, int, ...)>("open")(counts, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    void* mapped = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, sizeof(uint64_t) * kCalls) == 0)
      mapped = mmap(nullptr, sizeof(uint64_t) * kCalls, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) std::abort();
    close(fd);
    counts_ = static_cast<std::atomic<uint64_t>*>(mapped);
    // Open from the beginning: tests count descriptors.
    unreadable_ = real<int(const char*, int, ...)>("open")("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    if (unreadable_ < 0) std::abort();
    armed_ = std::getenv("SLLM_FAULT_DISARMED") == nullptr;
  }

  void arm(bool armed) { armed_ = armed; }

  bool concerns(const char* path) const {
    return armed_ && path != nullptr && std::strstr(path, path_.c_str()) != nullptr;
  }
  bool concerns(int fd) const { return armed_ && concerns(path_of(fd).c_str()); }

  // Counts a call, and says what is to become of it.
  Rule next(Call call) {
    const uint64_t number = counts_[call].fetch_add(1) + 1;
    const bool blocking = call == kBuffered || call == kDirect;
    const uint64_t read = blocking ? counts_[kRead].fetch_add(1) + 1 : 0;
    for (const Rule& rule : rules_) {
      const uint64_t at = rule.call == call ? number : rule.call == kRead && blocking ? read : 0;
      if (at < rule.first || at > rule.last) continue;
      counts_[kEffects].fetch_add(1);
      Rule now = rule;
      if (now.what == What::kShort) now.value = now.value * 0x9E3779B97F4A7C15 ^ at * 0xBF58476D1CE4E5B9;
      return now;
    }
    return {};
  }

  // A descriptor of which every read at its beginning fails with EIO: no process has anything at that address.
  int unreadable() const { return unreadable_; }

  static std::string path_of(int fd) {
    char link[64];
    char path[4096];
    std::snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof path);
    return length < 0 ? std::string() : std::string(path, static_cast<std::size_t>(length));
  }

  // The path of what is mapped at an address; nothing where that is no file.
  static std::string path_at(const void* address) {
    const auto wanted = reinterpret_cast<uintptr_t>(address);
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      uintptr_t begin = 0, end = 0;
      if (std::sscanf(line.c_str(), "%lx-%lx", &begin, &end) != 2 || wanted < begin || wanted >= end) continue;
      const std::size_t path = line.find('/');
      return path == std::string::npos ? std::string() : line.substr(path);
    }
    return {};
  }

 private:
  std::string path_;
  std::vector<Rule> rules_;
  std::atomic<uint64_t>* counts_ = nullptr;
  int unreadable_ = -1;
  std::atomic<bool> armed_{false};
};

// Libraries open files in their constructors, before this one's have run: so it is made when first asked for.
Shim& shim() {
  static Shim* const made = new Shim;
  return *made;
}

// Does to the file what the rule says is done to it, with errno left as it was.
void disturb(const Rule& rule, const std::string& path) {
  const int before = errno;
  int failed = 0;
  if (rule.what == What::kTruncate) failed = truncate(path.c_str(), static_cast<off_t>(rule.value));
  if (rule.what == What::kUnlink) failed = unlink(path.c_str());
  if (rule.what == What::kRewrite || rule.what == What::kReplace) {
    const bool replace = rule.what == What::kReplace;
    const std::string target = replace ? path + ".new" : path;
    struct stat was {};
    failed |= stat(path.c_str(), &was);
    const int fd = real<int(const char*, int, ...)>("open")(target.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    const std::string other(static_cast<std::size_t>(was.st_size), '\xA5');
    failed |= fd < 0 || pwrite(fd, other.data(), other.size(), 0) != static_cast<ssize_t>(other.size());
    if (replace) {  // Of the same size and age: only its number tells it from the one that was.
      const timespec times[2] = {was.st_atim, was.st_mtim};
      failed |= futimens(fd, times) | rename(target.c_str(), path.c_str());
    }
    failed |= close(fd);
  }
  if (failed != 0) {
    std::perror("fault_shim");
    std::abort();
  }
  errno = before;
}

template <typename Really>
int opening(const char* path, int flags, Really&& really) {
  if (!shim().concerns(path)) return really();
  const Rule rule = shim().next((flags & O_DIRECT) != 0 ? kOpenDirect : kOpen);
  if (rule.what == What::kFail) {
    errno = static_cast<int>(rule.value);
    return -1;
  }
  disturb(rule, path);
  return really();
}

template <typename Really>
int examining(int fd, Really&& really) {
  if (!shim().concerns(fd)) return really();
  const Rule rule = shim().next(kFstat);
  if (rule.what == What::kFail) {
    errno = static_cast<int>(rule.value);
    return -1;
  }
  disturb(rule, Shim::path_of(fd));
  return really();
}

// Gives back at most `most` bytes of the `got` that were read, and spoils the others.
ssize_t shortened(const iovec* room, int count, ssize_t got, uint64_t most) {
  ssize_t passed = 0;
  for (int k = 0; k < count; ++k) {
    for (std::size_t at = 0; at < room[k].iov_len && passed < got; ++at, ++passed)
      if (static_cast<uint64_t>(passed) >= most) static_cast<unsigned char*>(room[k].iov_base)[at] = 0xEE;
  }
  return std::min(got, static_cast<ssize_t>(most));
}

template <typename Really>
ssize_t reading(int fd, const iovec* room, int count, int flags, Really&& really) {
  if (!shim().concerns(fd)) return really();
  const bool direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
  const Rule rule = shim().next((flags & RWF_NOWAIT) != 0 ? kNowait : direct ? kDirect : kBuffered);
  if (rule.what == What::kEnd) return 0;
  if (rule.what == What::kFail) {
    errno = static_cast<int>(rule.value);
    return -1;
  }
  disturb(rule, Shim::path_of(fd));
  const ssize_t got = really();
  if (rule.what != What::kShort || got <= 1) return got;
  uint64_t most = 1 + rule.value % static_cast<uint64_t>(got - 1);
  if (rule.value >> 62 == 0 && most > 4096) most = most / 4096 * 4096;  // One in four ends where a direct read may.
  return shortened(room, count, got, most);
}

ssize_t reading(int fd, void* to, std::size_t length, off_t offset, const char* name) {
  const iovec room{to, length};
  return reading(fd, &room, 1, 0,
                 [&] { return real<ssize_t(int, void*, std::size_t, off_t)>(name)(fd, to, length, offset); });
}

ssize_t reading(int fd, const iovec* room, int count, off_t offset, const char* name) {
  return reading(fd, room, count, 0, [&] {
    return real<ssize_t(int, const iovec*, int, off_t)>(name)(fd, room, count, offset);
  });
}

ssize_t reading(int fd, const iovec* room, int count, off_t offset, int flags, const char* name) {
  return reading(fd, room, count, flags, [&] {
    return real<ssize_t(int, const iovec*, int, off_t, int)>(name)(fd, room, count, offset, flags);
  });
}

// One MADV_POPULATE_READ takes the kernel a while already: what it costs to look the mapping up is of no account.
int populating(void* address, std::size_t length, int advice) {
  auto* const really = real<int(void*, std::size_t, int)>("madvise");
  const std::string path = Shim::path_at(address);
  if (!shim().concerns(path.c_str())) return really(address, length, advice);
  const Rule rule = shim().next(kPopulate);
  if (rule.what == What::kFail) {
    errno = static_cast<int>(rule.value);
    return -1;
  }
  disturb(rule, path);
  return really(address, length, advice);
}

// The one io_uring of this process, seen from beside: the kernel gives its memory to whoever maps it. Requests are put
// there and never pass a function, but their submission does. Set up before the first of them.
struct WatchedRing {
  int fd = -1;
  unsigned char* rings = nullptr;
  io_uring_sqe* entries = nullptr;
  io_uring_params params{};
};
WatchedRing watched;

void watch(int fd, const io_uring_params& params) {
  const auto map = [fd](std::size_t length, off_t offset) {
    void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
    if (mapped == MAP_FAILED) std::abort();
    return mapped;
  };
  watched.params = params;
  watched.rings = static_cast<unsigned char*>(
      map(params.sq_off.array + params.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING));
  watched.entries = static_cast<io_uring_sqe*>(map(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
  watched.fd = fd;
}

// Looks at the request that is about to be submitted; one that is to fail is made to read what nobody can.
void submitting() {
  const auto field = [](uint32_t offset) { return reinterpret_cast<unsigned*>(watched.rings + offset); };
  const auto& offsets = watched.params.sq_off;
  const unsigned last = (*field(offsets.tail) - 1) & *field(offsets.ring_mask);
  io_uring_sqe& entry = watched.entries[field(offsets.array)[last]];
  if (!shim().concerns(entry.fd) || shim().next(kRing).what != What::kFail) return;
  entry.fd = shim().unreadable();
  entry.opcode = IORING_OP_READ;
  entry.off = 0;
}

mode_t mode_of(int flags, va_list rest) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? static_cast<mode_t>(va_arg(rest, int)) : 0;
}

}  // namespace

// On 64-bit machines the names with 64 are the same functions; which ones a program calls depends on how it was built.
extern "C" {

void fault_shim_set_up() { shim().set_up(); }

void fault_shim_arm(int armed) { shim().arm(armed != 0); }

long syscall(long number, ...) noexcept {
  va_list rest;
  va_start(rest, number);
  long given[6];
  for (long& each : given) each = va_arg(rest, long);
  va_end(rest);
  if (number == __NR_io_uring_enter && given[0] == watched.fd && given[1] > 0) submitting();
  const long answer = real<long(long, ...)>("syscall")(number, given[0], given[1], given[2], given[3], given[4], given[5]);
  if (number == __NR_io_uring_setup && answer >= 0)
    watch(static_cast<int>(answer), *reinterpret_cast<const io_uring_params*>(given[1]));
  return answer;
}

#define SLLM_OPEN(NAME)                                                                                      \
  int NAME(const char* path, int flags, ...) {                                                               \
    va_list rest;                                                                                            \
    va_start(rest, flags);                                                                                   \
    const mode_t mode = mode_of(flags, rest);                                                                \
    va_end(rest);                                                                                            \
    return opening(path, flags, [&] { return real<int(const char*, int, ...)>(#NAME)(path, flags, mode); }); \
  }
SLLM_OPEN(open)
SLLM_OPEN(open64)

#define SLLM_OPENAT(NAME)                                                                 \
  int NAME(int folder, const char* path, int flags, ...) {                                \
    va_list rest;                                                                         \
    va_start(rest, flags);                                                                \
    const mode_t mode = mode_of(flags, rest);                                             \
    va_end(rest);                                                                         \
    return opening(path, flags, [&] {                                                     \
      return real<int(int, const char*, int, ...)>(#NAME)(folder, path, flags, mode);     \
    });                                                                                   \
  }
SLLM_OPENAT(openat)
SLLM_OPENAT(openat64)

int fstat(int fd, struct stat* found) noexcept {
  return examining(fd, [&] { return real<int(int, struct stat*)>("fstat")(fd, found); });
}
int fstat64(int fd, struct stat64* found) noexcept {
  return examining(fd, [&] { return real<int(int, struct stat64*)>("fstat64")(fd, found); });
}
// What a program calls that was built against a libc before 2.33.
int __fxstat(int version, int fd, struct stat* found) noexcept {
  return examining(fd, [&] { return real<int(int, int, struct stat*)>("__fxstat")(version, fd, found); });
}
int __fxstat64(int version, int fd, struct stat64* found) noexcept {
  return examining(fd, [&] { return real<int(int, int, struct stat64*)>("__fxstat64")(version, fd, found); });
}

int madvise(void* address, std::size_t length, int advice) noexcept {
  if (advice == MADV_POPULATE_READ) return populating(address, length, advice);
  return real<int(void*, std::size_t, int)>("madvise")(address, length, advice);
}

ssize_t pread(int fd, void* to, std::size_t length, off_t offset) { return reading(fd, to, length, offset, "pread"); }
ssize_t pread64(int fd, void* to, std::size_t length, off64_t offset) {
  return reading(fd, to, length, offset, "pread64");
}
ssize_t preadv(int fd, const iovec* room, int count, off_t offset) {
  return reading(fd, room, count, offset, "preadv");
}
ssize_t preadv64(int fd, const iovec* room, int count, off64_t offset) {
  return reading(fd, room, count, offset, "preadv64");
}
ssize_t preadv2(int fd, const iovec* room, int count, off_t offset, int flags) {
  return reading(fd, room, count, offset, flags, "preadv2");
}
ssize_t preadv64v2(int fd, const iovec* room, int count, off64_t offset, int flags) {
  return reading(fd, room, count, offset, flags, "preadv64v2");
}

}  // extern "C"
