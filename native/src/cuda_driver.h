// The part of the CUDA driver API that this library calls, found at run time: no CUDA header or library builds it.
// Thread safety: a Driver is constant once it is there. Ownership: a Driver, and the library it loaded, last until the
// process ends; unloading a driver under its own threads is not supported by it.
//
// Names, versions and signatures below are compared with NVIDIA's headers by native/tests/cuda_declarations.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "error.h"

namespace sllm::cuda {

using Result = int;
using Ordinal = int;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;
using Pointer = unsigned long long;  // Device memory.
struct IpcHandle {
  char bytes[64];
};

inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kDeinitialized = 4;
inline constexpr Result kStubLibrary = 34;
inline constexpr Result kNoDevice = 100;
inline constexpr Result kInvalidDevice = 101;
inline constexpr Result kInvalidContext = 201;
inline constexpr Result kEccUncorrectable = 214;
inline constexpr Result kNvlinkUncorrectable = 220;
inline constexpr Result kContained = 226;
inline constexpr Result kInvalidHandle = 400;
inline constexpr Result kIllegalAddress = 700;
inline constexpr Result kLaunchTimeout = 702;
inline constexpr Result kContextIsDestroyed = 709;
inline constexpr Result kAssert = 710;
inline constexpr Result kAlreadyRegistered = 712;
inline constexpr Result kHardwareStackError = 714;
inline constexpr Result kIllegalInstruction = 715;
inline constexpr Result kMisalignedAddress = 716;
inline constexpr Result kInvalidAddressSpace = 717;
inline constexpr Result kInvalidPc = 718;
inline constexpr Result kLaunchFailed = 719;
inline constexpr Result kUnknown = 999;

inline constexpr unsigned kScheduleBlockingSync = 4;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kIpcLazyPeerAccess = 1;
inline constexpr unsigned kHostRegisterPortable = 1;

// X(name, suffix of the symbol, the CUDA version that this signature came with, arguments...)
#define SLLM_CUDA_FUNCTIONS(X)                                                  \
  X(cuInit, , 2000, unsigned)                                                   \
  X(cuDriverGetVersion, , 2020, int*)                                           \
  X(cuGetErrorName, , 6000, Result, const char**)                               \
  X(cuGetErrorString, , 6000, Result, const char**)                             \
  X(cuDeviceGetCount, , 2000, int*)                                             \
  X(cuDeviceGet, , 2000, Ordinal*, int)                                         \
  X(cuDeviceGetName, , 2000, char*, int, Ordinal)                               \
  X(cuDeviceTotalMem, _v2, 3020, size_t*, Ordinal)                              \
  X(cuDevicePrimaryCtxGetState, , 7000, Ordinal, unsigned*, int*)               \
  X(cuDevicePrimaryCtxSetFlags, _v2, 11000, Ordinal, unsigned)                  \
  X(cuDevicePrimaryCtxRetain, , 7000, Context*, Ordinal)                        \
  X(cuDevicePrimaryCtxRelease, _v2, 11000, Ordinal)                             \
  X(cuCtxPushCurrent, _v2, 4000, Context)                                       \
  X(cuCtxPopCurrent, _v2, 4000, Context*)                                       \
  X(cuMemGetInfo, _v2, 3020, size_t*, size_t*)                                  \
  X(cuMemAlloc, _v2, 3020, Pointer*, size_t)                                    \
  X(cuMemFree, _v2, 3020, Pointer)                                              \
  X(cuMemGetAddressRange, _v2, 3020, Pointer*, size_t*, Pointer)                \
  X(cuMemcpyHtoDAsync, _v2, 3020, Pointer, const void*, size_t, Stream)         \
  X(cuMemcpyDtoH, _v2, 3020, void*, Pointer, size_t)                            \
  X(cuStreamCreate, , 2000, Stream*, unsigned)                                  \
  X(cuStreamDestroy, _v2, 4000, Stream)                                         \
  X(cuStreamSynchronize, , 2000, Stream)                                        \
  X(cuEventCreate, , 2000, Event*, unsigned)                                    \
  X(cuEventDestroy, _v2, 4000, Event)                                           \
  X(cuEventRecord, , 2000, Event, Stream)                                       \
  X(cuEventSynchronize, , 2000, Event)                                          \
  X(cuIpcGetMemHandle, , 4010, IpcHandle*, Pointer)                             \
  X(cuIpcOpenMemHandle, _v2, 11000, Pointer*, IpcHandle, unsigned)              \
  X(cuIpcCloseMemHandle, , 4010, Pointer)                                       \
  X(cuMemHostRegister, _v2, 6050, void*, size_t, unsigned)                      \
  X(cuMemHostUnregister, , 4000, void*)

class Driver {
 public:
  // The driver in `library` (null: libcuda.so.1), loaded and initialised once in a process.
  // Throws SLLM_NO_DEVICE where there is none, or one too old; a later call tries again.
  static const Driver& get(const char* library);

  int version() const noexcept { return version_; }
  int device_count() const;
  // "what: CUDA_ERROR_NAME (number): what the driver says to it"
  Error failure(const std::string& what, Result result, sllm_code code = SLLM_DEVICE_FAILED) const;
  void check(Result result, const char* what) const {
    if (result != kSuccess) throw failure(what, result);
  }

#define SLLM_MEMBER(name, suffix, since, ...) Result (*name)(__VA_ARGS__) = nullptr;
  SLLM_CUDA_FUNCTIONS(SLLM_MEMBER)
#undef SLLM_MEMBER

 private:
  explicit Driver(const std::string& library);

  int version_ = 0;
  bool empty_ = false;  // A driver on a machine without a device refuses cuInit.
};

// Makes a context the calling thread's for a while, and gives the thread back what it had: it may be a caller's thread.
class Current {
 public:
  Current(const Driver& driver, Context context) : driver_(driver) {
    driver.check(driver.cuCtxPushCurrent(context), "cuCtxPushCurrent");
  }
  ~Current() {
    Context popped = nullptr;
    driver_.cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
};

// After these nothing works any more in the context, whatever is called.
bool ends_context(Result result) noexcept;

}  // namespace sllm::cuda
