// What every function of the C ABI does: it catches, and turns an exception into a code and a message.
// Thread safety: functions without state. Ownership: borrows the error that it fills.
#pragma once

#include <cstring>
#include <exception>
#include <new>
#include <utility>

#include "error.h"
#include "pool.h"
#include "sllm_native.h"

struct sllm_pool {
  sllm::Pool pool;
};

namespace sllm {

inline int32_t report(sllm_error* error, sllm_code code, int os_error, const char* message) noexcept {
  if (error != nullptr) {
    *error = {};
    error->code = code;
    error->os_error = os_error;
    std::strncpy(error->message, message, SLLM_MESSAGE_BYTES - 1);
  }
  return code;
}

template <typename Body>
int32_t guarded(sllm_error* error, Body&& body) noexcept {
  try {
    std::forward<Body>(body)();
    return SLLM_OK;
  } catch (const Error& caught) {
    return report(error, caught.code(), caught.os_error(), caught.what());
  } catch (const std::bad_alloc&) {
    return report(error, SLLM_NO_MEMORY, 0, "out of memory");
  } catch (const std::exception& caught) {
    return report(error, SLLM_INTERNAL, 0, caught.what());
  } catch (...) {
    return report(error, SLLM_INTERNAL, 0, "unknown exception");
  }
}

}  // namespace sllm
