#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

namespace sllm::cuda {
namespace {

// cuGetProcAddress_v2 itself, which came with CUDA 12. Its flags: 0 is the default search.
using Lookup = Result (*)(const char*, void**, int, uint64_t, int*);

void* open_library(const std::string& name) {
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) return library;
  const char* why = dlerror();
  throw Error(SLLM_NO_DEVICE, "no CUDA driver: " + std::string(why != nullptr ? why : name));
}

// A driver before CUDA 12 has no lookup of ours, but it has the symbols.
void* find(void* library, Lookup lookup, const char* name, const char* symbol, int since) {
  void* found = nullptr;
  if (lookup != nullptr && lookup(name, &found, since, 0, nullptr) == kSuccess && found != nullptr) return found;
  return dlsym(library, symbol);
}

}  // namespace

const Driver& Driver::get(const char* library) {
  static std::mutex mutex;
  // Never destroyed: threads may still be in a driver when the process ends.
  static auto& drivers = *new std::map<std::string, std::unique_ptr<Driver>>;  // Guarded by mutex.
  const std::string name = library != nullptr ? library : "libcuda.so.1";
  const std::lock_guard lock(mutex);
  auto& driver = drivers[name];
  if (!driver) driver.reset(new Driver(name));
  return *driver;
}

Driver::Driver(const std::string& name) {
  void* library = open_library(name);
  const auto lookup = reinterpret_cast<Lookup>(dlsym(library, "cuGetProcAddress_v2"));
  std::string missing;
#define SLLM_FIND(function, suffix, since, ...)                                                                  \
  function = reinterpret_cast<decltype(function)>(find(library, lookup, #function, #function #suffix, since));   \
  if (function == nullptr) missing += std::string(missing.empty() ? "" : ", ") + #function #suffix;
  SLLM_CUDA_FUNCTIONS(SLLM_FIND)
#undef SLLM_FIND
  if (!missing.empty()) {
    dlclose(library);
    throw Error(SLLM_NO_DEVICE, "the CUDA driver in " + name + " is too old, it lacks " + missing);
  }
  if (const Result result = cuInit(0); result == kNoDevice)
    empty_ = true;
  else if (result != kSuccess)
    throw failure("cuInit", result, result == kStubLibrary ? SLLM_NO_DEVICE : SLLM_DEVICE_FAILED);
  check(cuDriverGetVersion(&version_), "cuDriverGetVersion");
}

int Driver::device_count() const {
  int count = 0;
  if (!empty_) check(cuDeviceGetCount(&count), "cuDeviceGetCount");
  return count;
}

Error Driver::failure(const std::string& what, Result result, sllm_code code) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || name == nullptr) name = "unknown CUresult";
  if (cuGetErrorString(result, &text) != kSuccess || text == nullptr) text = "no description";
  return Error::of(code, what + ": " + name + " (" + std::to_string(result) + "): " + text, result);
}

bool ends_context(Result result) noexcept {
  switch (result) {
    case kDeinitialized:
    case kEccUncorrectable:
    case kNvlinkUncorrectable:
    case kContained:
    case kIllegalAddress:
    case kLaunchTimeout:
    case kContextIsDestroyed:
    case kAssert:
    case kHardwareStackError:
    case kIllegalInstruction:
    case kMisalignedAddress:
    case kInvalidAddressSpace:
    case kInvalidPc:
    case kLaunchFailed:
    case kUnknown:
      return true;
    default:
      return false;
  }
}

}  // namespace sllm::cuda
