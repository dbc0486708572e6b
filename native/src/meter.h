// Meter counts what goes one way, and for how long anything was on it: the bandwidth of that way, whoever shares it.
// Thread safety: any method, any thread. Ownership: a value that stays where it is.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>

#include "sllm_native.h"

namespace sllm {

class Meter {
 public:
  // One transfer's time on the way, from construction to end(), or to the end of the scope where it failed.
  class Trip {
   public:
    explicit Trip(Meter& meter) : meter_(&meter) { meter.begin(); }
    ~Trip() { end(0); }
    Trip(const Trip&) = delete;
    Trip& operator=(const Trip&) = delete;
    void end(uint64_t bytes) {
      if (meter_ != nullptr) meter_->end(bytes);
      meter_ = nullptr;
    }

   private:
    Meter* meter_;
  };

  void begin() {
    const std::lock_guard lock(mutex_);
    if (under_way_++ == 0) since_ = Clock::now();
  }

  void end(uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    bytes_ += bytes;
    if (--under_way_ == 0) busy_ += Clock::now() - since_;
  }

  sllm_path_facts facts() const {
    const std::lock_guard lock(mutex_);
    const auto busy = under_way_ == 0 ? busy_ : busy_ + (Clock::now() - since_);
    return {bytes_, std::chrono::duration<double>(busy).count()};
  }

 private:
  using Clock = std::chrono::steady_clock;

  mutable std::mutex mutex_;
  uint64_t under_way_ = 0;      // Guarded by mutex_, as is the rest.
  Clock::time_point since_;     // When under_way_ was last 0.
  Clock::duration busy_{};
  uint64_t bytes_ = 0;
};

// The ways that a Reader's bytes go.
struct Meters {
  Meter cached;
  Meter storage;
  Meter copied;
};

}  // namespace sllm
