// A libcuda.so.1 of ours: the part of the CUDA driver API that cuda_driver.h names, on machines without a device.
//
// Purpose: to be refused what the real driver refuses, and to fail, wait and count at will. Device memory is a memfd
// each, at addresses that the host cannot touch; an IPC handle opens the same bytes in another process as long as the
// owner lives. Each stream has a thread that does its copies in order. Where the real driver allows what this library
// has no business doing (freeing memory that is being copied to, destroying a busy stream), this one refuses.
// Thread safety: any function, any thread. Ownership: everything is the process's, nothing is freed or read at unload.
// Build: c++ -std=c++20 -shared -fPIC -pthread. -DFAKE_CUDA_BEFORE_12 leaves cuGetProcAddress_v2 out, and
// -DFAKE_CUDA_BEFORE_11 also what CUDA 11 brought.
//
// Knobs are set by fake_cuda_set(name, value), or before the first call by FAKE_CUDA_<NAME> in the environment:
//   devices, total_bytes (of each), version; hold (1: no copy is done until it is 0 again), delay_us (of every copy);
//   fail_enqueue_at, fail_async_at (the k-th copy from now; async is sticky), fail_record_at, fail_result (a CUresult);
//   fail_stream_at, fail_event_at (the k-th creation from now finds no memory); init_result, register_result,
//   ipc_open_result (a CUresult for each call, 0: none), retain_result (for the next call only); ipc_open_once (1: as
//   older drivers, which open a handle once in a context; newer ones count).
// fake_cuda_lose(ordinal, CUresult) ends a context at once, with the copies that are held.
// Counters are read by fake_cuda_get(name) and waited for by fake_cuda_wait(name, at least, limit in ms):
//   contexts allocations imports registrations streams events (living), stack (contexts pushed by this thread);
//   copies_asked copies_enqueued copies_done bytes_copied, synchronous (copies from memory that is not page-locked),
//   max_outstanding (copies in one stream), refused (calls that were a caller's mistake), abandoned (objects that ended
//   only with their context), lookups; and
//   by device, copies_done_0, copies_done_1 ...
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define FAKE_API extern "C" __attribute__((visibility("default")))

namespace {

using Result = int;
using Pointer = unsigned long long;

constexpr Result kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kNoDevice = 100,
                 kInvalidDevice = 101, kInvalidContext = 201, kMapFailed = 205, kAlreadyMapped = 208,
                 kPeerUnsupported = 217, kInvalidHandle = 400, kNotFound = 500, kIllegalAddress = 700,
                 kPrimaryActive = 708, kDestroyed = 709,
                 kAlreadyRegistered = 712, kNotRegistered = 713;
constexpr uint64_t kAddressAlignment = 512;
constexpr size_t kMaxStack = 64;

struct Context {
  int ordinal = 0;
  int retains = 0;
  Result sticky = kOk;
  uint64_t next_address = 0;
};

struct Allocation {
  Context* context = nullptr;
  uint64_t size = 0;
  std::byte* host = nullptr;
  int fd = -1;      // None where imported.
  int opens = 0;    // Of an import.
  int copies = 0;   // On their way into it.
  uint64_t nonce = 0;
};

struct Registration {
  Context* context = nullptr;
  uint64_t size = 0;
};

struct Event {
  Context* context = nullptr;
  uint64_t recorded = 0;
  uint64_t reached = 0;
};

struct Work {
  Event* event = nullptr;  // None: a copy.
  uint64_t record = 0;
  Allocation* to = nullptr;
  uint64_t offset = 0;
  const void* from = nullptr;
  uint64_t size = 0;
  Result failing = kOk;
};

struct Stream {
  Context* context = nullptr;
  std::deque<Work> work;
  int64_t copies = 0;
  bool ending = false;
  std::thread thread;
};

struct HandleText {
  char magic[8];
  int32_t pid;
  int32_t fd;
  uint64_t size;
  uint64_t nonce;
  int32_t ordinal;
  char zeros[28];
};
static_assert(sizeof(HandleText) == 64);
struct IpcHandle {
  char bytes[64];
};

const std::map<Result, std::pair<const char*, const char*>> kNames{
    {0, {"CUDA_SUCCESS", "no error"}},
    {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {34, {"CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"}},
    {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {205, {"CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"}},
    {208, {"CUDA_ERROR_ALREADY_MAPPED", "resource already mapped"}},
    {214, {"CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"}},
    {217, {"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices"}},
    {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {708, {"CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", "primary context is already active"}},
    {709, {"CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"}},
    {712, {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "memory is already registered"}},
    {713, {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "memory is not registered"}},
    {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
    {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {999, {"CUDA_ERROR_UNKNOWN", "unknown error"}},
};

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  bool initialised = false;
  pid_t pid = 0;
  std::map<std::string, int64_t> knobs{
      {"devices", 1},       {"total_bytes", 1 << 30}, {"version", 13000},     {"hold", 0},
      {"delay_us", 0},      {"fail_enqueue_at", 0},   {"fail_async_at", 0},   {"fail_record_at", 0},
      {"fail_result", 0},   {"init_result", 0},       {"register_result", 0}, {"ipc_open_result", 0},
      {"retain_result", 0}, {"fail_stream_at", 0},    {"fail_event_at", 0},   {"ipc_open_once", 0},
  };
  std::map<std::string, int64_t> counts;
  std::map<int, Context*> primaries;  // By ordinal.
  std::set<const Context*> contexts;  // Those that live.
  std::vector<std::unique_ptr<Context>> ever;  // Kept, so that no new one has the address of one that has ended.
  std::map<Pointer, Allocation*> allocations;
  std::map<const std::byte*, Registration> registrations;
  std::set<Stream*> streams;
  std::set<Event*> events;

  State() {
    for (auto& [name, value] : knobs) {
      std::string variable = "FAKE_CUDA_" + name;
      std::transform(variable.begin(), variable.end(), variable.begin(), [](unsigned char c) { return toupper(c); });
      if (const char* text = getenv(variable.c_str())) value = std::atoll(text);
    }
  }
};

State& state() {
  static auto& only = *new State;
  return only;
}

using Lock = std::unique_lock<std::mutex>;

std::vector<Context*>& stack() {
  static thread_local std::vector<Context*> contexts;
  return contexts;
}

Result refuse(Result result) {
  ++state().counts["refused"];
  return result;
}

// A child of fork() has the library but not the driver's threads: the real one refuses it so.
Result initialised() {
  if (!state().initialised || state().pid != getpid()) return refuse(kNotInitialized);
  return kOk;
}

Result current(Context*& context) {
  if (const Result result = initialised()) return result;
  if (stack().empty() || stack().back() == nullptr) return refuse(kInvalidContext);
  context = stack().back();
  if (!state().contexts.contains(context)) return refuse(kDestroyed);
  return context->sticky;
}

bool counted_down(const char* knob) {
  auto& left = state().knobs[knob];
  return left > 0 && --left == 0;
}

Result failure_or(Result usual) {
  const auto wanted = static_cast<Result>(state().knobs["fail_result"]);
  return wanted != 0 ? wanted : usual;
}

Allocation* holding(const Context* context, Pointer address, uint64_t size, uint64_t& offset) {
  auto after = state().allocations.upper_bound(address);
  if (after == state().allocations.begin()) return nullptr;
  const auto& [base, allocation] = *std::prev(after);
  offset = address - base;
  if (allocation->context != context || offset > allocation->size || size > allocation->size - offset) return nullptr;
  return allocation;
}

bool page_locked(const void* from, uint64_t size) {
  const auto* begin = static_cast<const std::byte*>(from);
  auto after = state().registrations.upper_bound(begin);
  if (after == state().registrations.begin()) return false;
  const auto& [base, registration] = *std::prev(after);
  return begin + size <= base + registration.size;
}

void do_copy(Lock& lock, Stream& stream, const Work& work) {
  auto& all = state();
  const auto delay_us = all.knobs["delay_us"];
  lock.unlock();
  if (delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
  std::memcpy(work.to->host + work.offset, work.from, work.size);
  lock.lock();
  ++all.counts["copies_done"];
  ++all.counts["copies_done_" + std::to_string(stream.context->ordinal)];
  all.counts["bytes_copied"] += static_cast<int64_t>(work.size);
}

void run(Stream* stream) {
  pthread_setname_np(pthread_self(), "fake-stream");
  auto& all = state();
  Lock lock(all.mutex);
  while (true) {
    all.changed.wait(lock, [&] {
      if (stream->ending || stream->work.empty()) return stream->ending;
      return stream->work.front().event != nullptr || all.knobs["hold"] == 0 || stream->context->sticky != kOk;
    });
    if (stream->work.empty()) return;
    const Work work = stream->work.front();
    const bool dead = stream->ending || stream->context->sticky != kOk;
    if (work.event != nullptr) {
      if (!dead && all.events.contains(work.event)) work.event->reached = std::max(work.event->reached, work.record);
    } else {
      if (!dead && work.failing != kOk)
        stream->context->sticky = work.failing;
      else if (!dead)
        do_copy(lock, *stream, work);
      --stream->copies;
      --work.to->copies;
    }
    stream->work.pop_front();
    all.changed.notify_all();
  }
}

void end_stream(Lock& lock, Stream* stream) {
  auto& all = state();
  all.streams.erase(stream);
  stream->ending = true;
  all.changed.notify_all();
  lock.unlock();
  stream->thread.join();
  lock.lock();
  delete stream;
}

void end_allocation(Pointer address) {
  auto& all = state();
  Allocation* allocation = all.allocations[address];
  all.allocations.erase(address);
  munmap(allocation->host, allocation->size);
  if (allocation->fd >= 0) close(allocation->fd);
  delete allocation;
}

[[maybe_unused]] void end_context(Lock& lock, Context* context) {
  auto& all = state();
  int64_t abandoned = 0;
  const auto its_streams = all.streams;
  for (Stream* stream : its_streams)
    if (stream->context == context) {
      end_stream(lock, stream);
      ++abandoned;
    }
  abandoned += std::erase_if(all.events, [&](Event* event) {
    const bool gone = event->context == context;
    if (gone) delete event;
    return gone;
  });
  std::vector<Pointer> memory;
  for (const auto& [address, allocation] : all.allocations)
    if (allocation->context == context) memory.push_back(address);
  for (const Pointer address : memory) end_allocation(address);
  abandoned += static_cast<int64_t>(memory.size());
  abandoned += std::erase_if(all.registrations, [&](const auto& each) { return each.second.context == context; });
  // In a lost context nothing can be given back, so that is nobody's fault.
  if (context->sticky == kOk) all.counts["abandoned"] += abandoned;
  all.contexts.erase(context);
}

std::string memory_name(uint64_t nonce) {
  char text[64];
  std::snprintf(text, sizeof text, "fake-cuda-%016llx", static_cast<unsigned long long>(nonce));
  return text;
}

Pointer place(Context* context, uint64_t size) {
  const Pointer address = context->next_address;
  // A hole after each, so that running over the end of one never lands in the next.
  context->next_address += (size + 2 * kAddressAlignment - 1) / kAddressAlignment * kAddressAlignment;
  return address;
}

int64_t counted(const std::string& name) {
  auto& all = state();
  if (name == "contexts") {
    int64_t retains = 0;
    for (const Context* context : all.contexts) retains += context->retains;
    return retains;
  }
  if (name == "allocations" || name == "imports")
    return std::count_if(all.allocations.begin(), all.allocations.end(),
                         [&](const auto& each) { return (each.second->fd < 0) == (name == "imports"); });
  if (name == "registrations") return static_cast<int64_t>(all.registrations.size());
  if (name == "stack") return static_cast<int64_t>(stack().size());
  if (name == "streams") return static_cast<int64_t>(all.streams.size());
  if (name == "events") return static_cast<int64_t>(all.events.size());
  const auto found = all.counts.find(name);
  return found == all.counts.end() ? 0 : found->second;
}

}  // namespace

// ---- Control ----

FAKE_API int fake_cuda_set(const char* name, int64_t value) {
  const Lock lock(state().mutex);
  const auto found = state().knobs.find(name);
  if (found == state().knobs.end()) return 1;
  found->second = value;
  state().changed.notify_all();
  return 0;
}

FAKE_API int64_t fake_cuda_get(const char* name) {
  const Lock lock(state().mutex);
  return counted(name);
}

FAKE_API int fake_cuda_wait(const char* name, int64_t at_least, int64_t limit_ms) {
  Lock lock(state().mutex);
  return state().changed.wait_for(lock, std::chrono::milliseconds(limit_ms),
                                  [&] { return counted(name) >= at_least; })
             ? 0
             : 1;
}

FAKE_API void fake_cuda_lose(int ordinal, Result result) {
  const Lock lock(state().mutex);
  state().primaries.at(ordinal)->sticky = result;
  state().changed.notify_all();
}

// ---- Driver and devices ----

FAKE_API Result cuInit(unsigned flags) {
  const Lock lock(state().mutex);
  if (flags != 0) return refuse(kInvalidValue);
  if (state().initialised && state().pid != getpid()) return kNotInitialized;
  if (const auto result = static_cast<Result>(state().knobs["init_result"])) return result;
  if (state().knobs["devices"] == 0) return kNoDevice;
  state().initialised = true;
  state().pid = getpid();
  return kOk;
}

FAKE_API Result cuDriverGetVersion(int* version) {
  const Lock lock(state().mutex);
  *version = static_cast<int>(state().knobs["version"]);
  return kOk;
}

FAKE_API Result cuGetErrorName(Result error, const char** text) {
  const auto found = kNames.find(error);
  *text = found == kNames.end() ? nullptr : found->second.first;
  return found == kNames.end() ? kInvalidValue : kOk;
}

FAKE_API Result cuGetErrorString(Result error, const char** text) {
  const auto found = kNames.find(error);
  *text = found == kNames.end() ? nullptr : found->second.second;
  return found == kNames.end() ? kInvalidValue : kOk;
}

FAKE_API Result cuDeviceGetCount(int* count) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  *count = static_cast<int>(state().knobs["devices"]);
  return kOk;
}

FAKE_API Result cuDeviceGet(int* device, int ordinal) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  if (ordinal < 0 || ordinal >= state().knobs["devices"]) return refuse(kInvalidDevice);
  *device = ordinal;
  return kOk;
}

FAKE_API Result cuDeviceGetName(char* name, int length, int device) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  if (device < 0 || device >= state().knobs["devices"]) return refuse(kInvalidDevice);
  std::snprintf(name, static_cast<size_t>(length), "Fake %d", device);
  return kOk;
}

FAKE_API Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  if (device < 0 || device >= state().knobs["devices"]) return refuse(kInvalidDevice);
  *bytes = static_cast<size_t>(state().knobs["total_bytes"]);
  return kOk;
}

// ---- Contexts ----

FAKE_API Result cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  *flags = 0;
  *active = state().primaries.contains(device) ? 1 : 0;
  return kOk;
}

#ifndef FAKE_CUDA_BEFORE_11
FAKE_API Result cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  if (flags > 0x1f) return refuse(kInvalidValue);
  return state().primaries.contains(device) ? refuse(kPrimaryActive) : kOk;
}

FAKE_API Result cuDevicePrimaryCtxRelease_v2(int device) {
  Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  const auto found = state().primaries.find(device);
  if (found == state().primaries.end()) return refuse(kInvalidContext);
  Context* context = found->second;
  if (--context->retains > 0) return kOk;
  state().primaries.erase(found);
  end_context(lock, context);
  return kOk;
}
#endif

FAKE_API Result cuDevicePrimaryCtxRetain(Context** context, int device) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  if (device < 0 || device >= state().knobs["devices"]) return refuse(kInvalidDevice);
  if (const auto result = static_cast<Result>(std::exchange(state().knobs["retain_result"], 0))) return result;
  auto& primary = state().primaries[device];
  if (primary == nullptr) {
    primary = state().ever.emplace_back(std::make_unique<Context>()).get();
    primary->ordinal = device;
    primary->next_address = (uint64_t{1} << 44) * static_cast<uint64_t>(device + 1);
    state().contexts.insert(primary);
  }
  ++primary->retains;
  *context = primary;
  return kOk;
}

FAKE_API Result cuCtxPushCurrent_v2(Context* context) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  if (!state().contexts.contains(context) || stack().size() == kMaxStack) return refuse(kInvalidContext);
  stack().push_back(context);
  return kOk;
}

FAKE_API Result cuCtxPopCurrent_v2(Context** context) {
  const Lock lock(state().mutex);
  if (const Result result = initialised()) return result;
  if (stack().empty()) return refuse(kInvalidContext);
  *context = stack().back();
  stack().pop_back();
  return kOk;
}

// ---- Memory ----

FAKE_API Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  *total_bytes = *free_bytes = static_cast<size_t>(state().knobs["total_bytes"]);
  for (const auto& [address, allocation] : state().allocations)
    if (allocation->context == context && allocation->fd >= 0) *free_bytes -= std::min(*free_bytes, allocation->size);
  return kOk;
}

FAKE_API Result cuMemAlloc_v2(Pointer* address, size_t size) {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  if (const Result result = cuMemGetInfo_v2(&free_bytes, &total_bytes)) return result;
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (size == 0) return refuse(kInvalidValue);
  if (size > free_bytes) return kOutOfMemory;
  uint64_t nonce = 0;
  if (getrandom(&nonce, sizeof nonce, 0) != sizeof nonce) return kOutOfMemory;
  const int fd = memfd_create(memory_name(nonce).c_str(), MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(size)) != 0) return kOutOfMemory;
  void* host = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (host == MAP_FAILED) return kOutOfMemory;
  *address = place(context, size);
  auto* made = new Allocation;
  *made = {context, size, static_cast<std::byte*>(host), fd, 0, 0, nonce};
  state().allocations[*address] = made;
  return kOk;
}

FAKE_API Result cuMemFree_v2(Pointer address) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  const auto found = state().allocations.find(address);
  if (found == state().allocations.end() || found->second->fd < 0 || found->second->copies > 0)
    return refuse(kInvalidValue);
  end_allocation(address);
  return kOk;
}

FAKE_API Result cuMemGetAddressRange_v2(Pointer* base, size_t* size, Pointer address) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  uint64_t offset = 0;
  const Allocation* found = holding(context, address, 1, offset);
  if (found == nullptr) return refuse(kNotFound);
  *base = address - offset;
  *size = found->size;
  return kOk;
}

FAKE_API Result cuMemHostRegister_v2(void* from, size_t size, unsigned flags) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (const auto result = static_cast<Result>(state().knobs["register_result"])) return result;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  auto* begin = static_cast<std::byte*>(from);
  if (size == 0 || (flags & ~1u) != 0 || reinterpret_cast<uintptr_t>(from) % page != 0) return refuse(kInvalidValue);
  std::vector<unsigned char> present((size + page - 1) / page);
  if (mincore(from, size, present.data()) != 0) return refuse(kInvalidValue);
  for (const auto& [base, registration] : state().registrations)
    if (begin < base + registration.size && base < begin + size) return refuse(kAlreadyRegistered);
  state().registrations[begin] = {context, size};
  return kOk;
}

FAKE_API Result cuMemHostUnregister(void* from) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (state().registrations.erase(static_cast<std::byte*>(from)) == 0) return refuse(kNotRegistered);
  return kOk;
}

FAKE_API Result cuMemcpyDtoH_v2(void* to, Pointer from, size_t size) {
  Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  uint64_t offset = 0;
  Allocation* allocation = holding(context, from, size, offset);
  if (allocation == nullptr) return refuse(kInvalidValue);
  ++allocation->copies;
  lock.unlock();
  std::memcpy(to, allocation->host + offset, size);
  lock.lock();
  --allocation->copies;
  return kOk;
}

// ---- Sharing with other processes ----

FAKE_API Result cuIpcGetMemHandle(IpcHandle* handle, Pointer address) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  const auto found = state().allocations.find(address);
  if (found == state().allocations.end() || found->second->fd < 0) return refuse(kInvalidValue);
  HandleText text{{'f', 'a', 'k', 'e', 'c', 'u', 'd', 'a'}, getpid(), found->second->fd, found->second->size,
                  found->second->nonce, context->ordinal, {}};
  std::memcpy(handle, &text, sizeof text);
  return kOk;
}

#ifndef FAKE_CUDA_BEFORE_11
FAKE_API Result cuIpcOpenMemHandle_v2(Pointer* address, IpcHandle handle, unsigned flags) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (const auto result = static_cast<Result>(state().knobs["ipc_open_result"])) return result;
  HandleText text;
  std::memcpy(&text, &handle, sizeof text);
  if (flags != 1 || std::memcmp(text.magic, "fakecuda", 8) != 0) return refuse(kInvalidValue);
  if (text.pid == getpid()) return refuse(kInvalidContext);
  if (text.ordinal != context->ordinal) return refuse(kPeerUnsupported);
  for (const auto& [at, allocation] : state().allocations)
    if (allocation->fd < 0 && allocation->nonce == text.nonce && allocation->context == context) {
      if (state().knobs["ipc_open_once"] != 0) return refuse(kAlreadyMapped);
      ++allocation->opens;
      *address = at;
      return kOk;
    }
  // A descriptor of that number may be another file by now, or that process another one.
  const std::string path = "/proc/" + std::to_string(text.pid) + "/fd/" + std::to_string(text.fd);
  char target[256] = "";
  if (readlink(path.c_str(), target, sizeof target - 1) < 0 ||
      std::strstr(target, memory_name(text.nonce).c_str()) == nullptr)
    return refuse(kInvalidHandle);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return kMapFailed;
  void* host = mmap(nullptr, text.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (host == MAP_FAILED) return kMapFailed;
  *address = place(context, text.size);
  auto* made = new Allocation;
  *made = {context, text.size, static_cast<std::byte*>(host), -1, 1, 0, text.nonce};
  state().allocations[*address] = made;
  return kOk;
}
#endif

FAKE_API Result cuIpcCloseMemHandle(Pointer address) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  const auto found = state().allocations.find(address);
  if (found == state().allocations.end() || found->second->fd >= 0) return refuse(kInvalidValue);
  if (found->second->opens == 1 && found->second->copies > 0) return refuse(kInvalidValue);
  if (--found->second->opens == 0) end_allocation(address);
  return kOk;
}

// ---- Streams and events ----

FAKE_API Result cuStreamCreate(Stream** stream, unsigned flags) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (flags > 1) return refuse(kInvalidValue);
  if (counted_down("fail_stream_at")) return kOutOfMemory;
  auto* made = new Stream;
  made->context = context;
  made->thread = std::thread(run, made);
  state().streams.insert(made);
  *stream = made;
  return kOk;
}

FAKE_API Result cuStreamDestroy_v2(Stream* stream) {
  Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (!state().streams.contains(stream) || !stream->work.empty()) return refuse(kInvalidHandle);
  end_stream(lock, stream);
  return kOk;
}

FAKE_API Result cuStreamSynchronize(Stream* stream) {
  Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (!state().streams.contains(stream)) return refuse(kInvalidHandle);
  state().changed.wait(lock, [&] { return stream->work.empty() || context->sticky != kOk; });
  return context->sticky;
}

FAKE_API Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t size, Stream* stream) {
  Lock lock(state().mutex);
  auto& all = state();
  Context* context = nullptr;
  ++all.counts["copies_asked"];
  if (const Result result = current(context)) return result;
  if (!all.streams.contains(stream) || stream->context != context) return refuse(kInvalidHandle);
  Work work;
  work.to = holding(context, to, size, work.offset);
  if (work.to == nullptr || size == 0) return refuse(kInvalidValue);
  const bool fails_at_once = counted_down("fail_enqueue_at");
  if (fails_at_once) {
    const Result result = failure_or(kInvalidValue);
    // Some errors are of this call alone; these the context does not survive.
    if (result >= kIllegalAddress || result == 214) context->sticky = result;
    all.changed.notify_all();
    return result;
  }
  if (counted_down("fail_async_at")) work.failing = failure_or(kIllegalAddress);
  work.from = from;
  work.size = size;
  ++work.to->copies;
  ++stream->copies;
  ++all.counts["copies_enqueued"];
  auto& most = all.counts["max_outstanding"];
  most = std::max(most, stream->copies);
  stream->work.push_back(work);
  all.changed.notify_all();
  if (page_locked(from, size)) return kOk;
  ++all.counts["synchronous"];
  all.changed.wait(lock, [&] { return stream->work.empty() || context->sticky != kOk; });
  return context->sticky;
}

FAKE_API Result cuEventCreate(Event** event, unsigned flags) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (flags > 7) return refuse(kInvalidValue);
  if (counted_down("fail_event_at")) return kOutOfMemory;
  *event = new Event{context, 0, 0};
  state().events.insert(*event);
  return kOk;
}

FAKE_API Result cuEventDestroy_v2(Event* event) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (!state().events.contains(event) || event->reached != event->recorded) return refuse(kInvalidHandle);
  state().events.erase(event);
  delete event;
  return kOk;
}

FAKE_API Result cuEventRecord(Event* event, Stream* stream) {
  const Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (!state().events.contains(event) || !state().streams.contains(stream) || event->context != stream->context)
    return refuse(kInvalidHandle);
  if (counted_down("fail_record_at")) return failure_or(kInvalidHandle);
  Work work;
  work.event = event;
  work.record = ++event->recorded;
  stream->work.push_back(work);
  state().changed.notify_all();
  return kOk;
}

FAKE_API Result cuEventSynchronize(Event* event) {
  Lock lock(state().mutex);
  Context* context = nullptr;
  if (const Result result = current(context)) return result;
  if (!state().events.contains(event)) return refuse(kInvalidHandle);
  const uint64_t awaited = event->recorded;
  state().changed.wait(lock, [&] { return event->reached >= awaited || event->context->sticky != kOk; });
  return event->context->sticky;
}

// ---- Lookup ----

#if !defined(FAKE_CUDA_BEFORE_12) && !defined(FAKE_CUDA_BEFORE_11)
FAKE_API Result cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
#define FAKE_ENTRY(name, symbol, since) {name, {since, reinterpret_cast<void*>(&symbol)}}
  static const auto& table = *new std::map<std::string, std::pair<int, void*>>{
      FAKE_ENTRY("cuInit", cuInit, 2000),
      FAKE_ENTRY("cuDriverGetVersion", cuDriverGetVersion, 2020),
      FAKE_ENTRY("cuGetErrorName", cuGetErrorName, 6000),
      FAKE_ENTRY("cuGetErrorString", cuGetErrorString, 6000),
      FAKE_ENTRY("cuDeviceGetCount", cuDeviceGetCount, 2000),
      FAKE_ENTRY("cuDeviceGet", cuDeviceGet, 2000),
      FAKE_ENTRY("cuDeviceGetName", cuDeviceGetName, 2000),
      FAKE_ENTRY("cuDeviceTotalMem", cuDeviceTotalMem_v2, 3020),
      FAKE_ENTRY("cuDevicePrimaryCtxGetState", cuDevicePrimaryCtxGetState, 7000),
      FAKE_ENTRY("cuDevicePrimaryCtxSetFlags", cuDevicePrimaryCtxSetFlags_v2, 11000),
      FAKE_ENTRY("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain, 7000),
      FAKE_ENTRY("cuDevicePrimaryCtxRelease", cuDevicePrimaryCtxRelease_v2, 11000),
      FAKE_ENTRY("cuCtxPushCurrent", cuCtxPushCurrent_v2, 4000),
      FAKE_ENTRY("cuCtxPopCurrent", cuCtxPopCurrent_v2, 4000),
      FAKE_ENTRY("cuMemGetInfo", cuMemGetInfo_v2, 3020),
      FAKE_ENTRY("cuMemAlloc", cuMemAlloc_v2, 3020),
      FAKE_ENTRY("cuMemFree", cuMemFree_v2, 3020),
      FAKE_ENTRY("cuMemGetAddressRange", cuMemGetAddressRange_v2, 3020),
      FAKE_ENTRY("cuMemcpyHtoDAsync", cuMemcpyHtoDAsync_v2, 3020),
      FAKE_ENTRY("cuMemcpyDtoH", cuMemcpyDtoH_v2, 3020),
      FAKE_ENTRY("cuStreamCreate", cuStreamCreate, 2000),
      FAKE_ENTRY("cuStreamDestroy", cuStreamDestroy_v2, 4000),
      FAKE_ENTRY("cuStreamSynchronize", cuStreamSynchronize, 2000),
      FAKE_ENTRY("cuEventCreate", cuEventCreate, 2000),
      FAKE_ENTRY("cuEventDestroy", cuEventDestroy_v2, 4000),
      FAKE_ENTRY("cuEventRecord", cuEventRecord, 2000),
      FAKE_ENTRY("cuEventSynchronize", cuEventSynchronize, 2000),
      FAKE_ENTRY("cuIpcGetMemHandle", cuIpcGetMemHandle, 4010),
      FAKE_ENTRY("cuIpcOpenMemHandle", cuIpcOpenMemHandle_v2, 11000),
      FAKE_ENTRY("cuIpcCloseMemHandle", cuIpcCloseMemHandle, 4010),
      FAKE_ENTRY("cuMemHostRegister", cuMemHostRegister_v2, 6050),
      FAKE_ENTRY("cuMemHostUnregister", cuMemHostUnregister, 4000),
  };
#undef FAKE_ENTRY
  const Lock lock(state().mutex);
  const auto found = table.find(symbol);
  *function = nullptr;
  if (flags != 0) return refuse(kInvalidValue);
  const int answer = found == table.end() ? 1 : version < found->second.first ? 2 : 0;
  if (status != nullptr) *status = answer;
  if (answer != 0) return refuse(kNotFound);
  ++state().counts["lookups"];
  *function = found->second.second;
  return kOk;
}
#endif
