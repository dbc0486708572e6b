// clock_shim stands between a process and its wall clock (LD_PRELOAD), and sets it forward or back while it runs.
//
// CLOCK_SHIM_OFFSET A file of eight bytes: an int64, the seconds by which CLOCK_REALTIME is off. It is mapped, so that
//                   whoever writes it makes the clock jump.
//
// Thread safety: the mapping is made before a second thread is, and its one word is read atomically.
// Ownership: the mapping lives as long as the process.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <ctime>

namespace {

const std::atomic<int64_t>* offset = nullptr;

__attribute__((constructor)) void SetUp() {
  const char* path = std::getenv("CLOCK_SHIM_OFFSET");
  if (path == nullptr) return;
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) abort();
  void* mapped = mmap(nullptr, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) abort();
  close(fd);
  offset = static_cast<const std::atomic<int64_t>*>(mapped);
}

int64_t Offset() { return offset == nullptr ? 0 : offset->load(); }

}  // namespace

extern "C" int clock_gettime(clockid_t clock, timespec* at) noexcept {
  static const auto real = reinterpret_cast<int (*)(clockid_t, timespec*)>(dlsym(RTLD_NEXT, "clock_gettime"));
  const int result = real(clock, at);
  if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += Offset();
  return result;
}

extern "C" int gettimeofday(timeval* at, void* zone) noexcept {
  static const auto real = reinterpret_cast<int (*)(timeval*, void*)>(dlsym(RTLD_NEXT, "gettimeofday"));
  const int result = real(at, zone);
  if (result == 0) at->tv_sec += Offset();
  return result;
}

extern "C" time_t time(time_t* at) noexcept {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  if (at != nullptr) *at = now.tv_sec;
  return now.tv_sec;
}
