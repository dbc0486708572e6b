// Error is the one exception of this library; abi.cc turns it into a code and a message.
// Thread safety: a value. Ownership: owns its text.
#pragma once

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "sllm_native.h"

namespace sllm {

class Error : public std::runtime_error {
 public:
  Error(sllm_code code, const std::string& message, int os_error = 0)
      : std::runtime_error(os_error == 0 ? message : message + ": " + describe(os_error)),
        code_(code),
        os_error_(os_error) {}

  // For codes that are no errno, such as a CUresult: `message` says it all.
  static Error of(sllm_code code, const std::string& message, int os_error) {
    Error error(code, message);
    error.os_error_ = os_error;
    return error;
  }

  sllm_code code() const noexcept { return code_; }
  int os_error() const noexcept { return os_error_; }

 private:
  // strerror_r has two signatures; overloads accept whichever this libc has.
  static std::string text(const char* answer, const char*) { return answer; }
  static std::string text(int, const char* buffer) { return buffer; }
  static std::string describe(int os_error) {
    char buffer[128] = "";
    return text(strerror_r(os_error, buffer, sizeof buffer), buffer);
  }

  sllm_code code_;
  int os_error_;
};

}  // namespace sllm
