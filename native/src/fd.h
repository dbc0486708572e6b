// Fd owns one file descriptor.
// Thread safety: none of its own. Ownership: closes what it holds; moving hands it over.
#pragma once

#include <unistd.h>

#include <utility>

namespace sllm {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, kNone)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, kNone);
    }
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }

  int get() const noexcept { return fd_; }
  bool open() const noexcept { return fd_ >= 0; }
  void reset() noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = kNone;
  }

 private:
  static constexpr int kNone = -1;
  int fd_ = kNone;
};

}  // namespace sllm
