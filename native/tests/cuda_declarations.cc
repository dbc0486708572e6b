// Compares what cuda_driver.h declares with NVIDIA's own headers: compiling this file is the test, nothing runs.
// Thread safety, ownership: none. Build: c++ -fsyntax-only -std=c++20 -I CUDA/include -I native/src -I native/include
#include "cuda_driver.h"

#include <cuda.h>
#include <cudaTypedefs.h>

#include <type_traits>

namespace sllm::cuda {
namespace {

static_assert(CUDA_VERSION >= 12000, "headers before CUDA 12 do not declare cuGetProcAddress_v2");

// Each of NVIDIA's types and ours for it. A handle is a pointer in both, an enum an int.
template <typename Theirs>
struct Ours {
  using type = Theirs;
};
template <typename Theirs>
  requires std::is_enum_v<Theirs>
struct Ours<Theirs> {
  static_assert(sizeof(Theirs) == sizeof(int));
  using type = int;
};
template <>
struct Ours<CUcontext> {
  using type = Context;
};
template <>
struct Ours<CUstream> {
  using type = Stream;
};
template <>
struct Ours<CUevent> {
  using type = Event;
};
template <>
struct Ours<CUipcMemHandle> {
  using type = IpcHandle;
};
template <typename Theirs>
struct Ours<Theirs*> {
  using type = typename Ours<Theirs>::type*;
};
template <typename Back, typename... Arguments>
struct Ours<Back(Arguments...)> {
  using type = typename Ours<Back>::type(typename Ours<Arguments>::type...);
};
template <typename Theirs>
using OursFor = typename Ours<Theirs>::type;

static_assert(std::is_same_v<Pointer, CUdeviceptr> && std::is_same_v<Ordinal, CUdevice>);
static_assert(sizeof(IpcHandle) == sizeof(CUipcMemHandle) && alignof(IpcHandle) == alignof(CUipcMemHandle));
static_assert(sizeof(Context) == sizeof(CUcontext) && sizeof(Stream) == sizeof(CUstream));
static_assert(sizeof(Event) == sizeof(CUevent) && sizeof(Result) == sizeof(CUresult));

// The symbol has our signature, and the version that we ask cuGetProcAddress for is the one that it came with.
#define SLLM_COMPARE(name, suffix, since, ...)                                       \
  static_assert(std::is_same_v<Result(__VA_ARGS__), OursFor<decltype(name##suffix)>>); \
  static_assert(std::is_same_v<decltype(&name##suffix), PFN_##name##_v##since>);
SLLM_CUDA_FUNCTIONS(SLLM_COMPARE)
#undef SLLM_COMPARE

static_assert(std::is_same_v<Result(const char*, void**, int, uint64_t, int*),
                             OursFor<decltype(cuGetProcAddress_v2)>>);

static_assert(kSuccess == CUDA_SUCCESS);
static_assert(kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(kDeinitialized == CUDA_ERROR_DEINITIALIZED);
static_assert(kStubLibrary == CUDA_ERROR_STUB_LIBRARY);
static_assert(kNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(kInvalidDevice == CUDA_ERROR_INVALID_DEVICE);
static_assert(kInvalidContext == CUDA_ERROR_INVALID_CONTEXT);
static_assert(kEccUncorrectable == CUDA_ERROR_ECC_UNCORRECTABLE);
static_assert(kNvlinkUncorrectable == CUDA_ERROR_NVLINK_UNCORRECTABLE);
#if CUDA_VERSION >= 12080
static_assert(kContained == CUDA_ERROR_CONTAINED);
#endif
static_assert(kInvalidHandle == CUDA_ERROR_INVALID_HANDLE);
static_assert(kIllegalAddress == CUDA_ERROR_ILLEGAL_ADDRESS);
static_assert(kLaunchTimeout == CUDA_ERROR_LAUNCH_TIMEOUT);
static_assert(kContextIsDestroyed == CUDA_ERROR_CONTEXT_IS_DESTROYED);
static_assert(kAssert == CUDA_ERROR_ASSERT);
static_assert(kAlreadyRegistered == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
static_assert(kHardwareStackError == CUDA_ERROR_HARDWARE_STACK_ERROR);
static_assert(kIllegalInstruction == CUDA_ERROR_ILLEGAL_INSTRUCTION);
static_assert(kMisalignedAddress == CUDA_ERROR_MISALIGNED_ADDRESS);
static_assert(kInvalidAddressSpace == CUDA_ERROR_INVALID_ADDRESS_SPACE);
static_assert(kInvalidPc == CUDA_ERROR_INVALID_PC);
static_assert(kLaunchFailed == CUDA_ERROR_LAUNCH_FAILED);
static_assert(kUnknown == CUDA_ERROR_UNKNOWN);

static_assert(kScheduleBlockingSync == CU_CTX_SCHED_BLOCKING_SYNC);
static_assert(kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(kEventBlockingSync == CU_EVENT_BLOCKING_SYNC);
static_assert(kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(kIpcLazyPeerAccess == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
static_assert(kHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(SLLM_HANDLE_BYTES == CU_IPC_HANDLE_SIZE);

}  // namespace
}  // namespace sllm::cuda
