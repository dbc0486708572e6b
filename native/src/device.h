// Device is one CUDA device: its primary context, a few streams, and two threads: one begins copies, one sees them
// through. Buffer is device memory: of this process, or of another that exported it.
// Thread safety: any method, any thread; but ~Buffer and ~Device not from `Copy::done`, which they wait for.
// Ownership: a Device owns its streams, events and threads, and holds the primary context; it outlives its Buffers. A
// pool outlives its registrations. Nobody else is to reset the primary context meanwhile.
//
// The queue of copies is as long as the loads have chunks in the pool; what is on its way to the device is bounded by
// kCopiesPerStream. Once the driver says that the context is lost, everything fails at once with that reason: CUDA
// mends no context, only a new process gets a working one.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cuda_driver.h"
#include "error.h"
#include "pool.h"

namespace sllm {

class Device;

inline constexpr unsigned kMaxStreams = 32;
inline constexpr unsigned kCopiesPerStream = 2;  // One on its way, one behind it, so that the stream never starves.

class Buffer {
 public:
  static std::unique_ptr<Buffer> create(Device& device, uint64_t size_bytes);
  // `size_bytes` may be less than what was exported, not more.
  static std::unique_ptr<Buffer> open(Device& device, const uint8_t* handle, uint64_t size_bytes);
  // Waits until the `done` of every copy into it has returned.
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Keeps a buffer from being destroyed: ~Buffer waits for it.
  class Pin {
   public:
    explicit Pin(Buffer& buffer);
    ~Pin();
    Pin(const Pin&) = delete;
    Pin& operator=(const Pin&) = delete;

   private:
    Buffer& buffer_;
  };

  Device& device() const noexcept { return device_; }
  uint64_t address() const noexcept { return address_; }
  uint64_t size_bytes() const noexcept { return size_bytes_; }
  void export_to(uint8_t* handle) const;
  // Reads what is there; copies still on their way it does not wait for.
  void read(uint64_t offset, uint64_t length, void* target) const;

 private:
  friend class Device;
  Buffer(Device& device, uint64_t address, uint64_t size_bytes, bool owned)
      : device_(device), address_(address), size_bytes_(size_bytes), owned_(owned) {}
  bool holds(uint64_t offset, uint64_t length) const noexcept {
    return offset <= size_bytes_ && length <= size_bytes_ - offset;
  }

  Device& device_;
  const uint64_t address_;
  const uint64_t size_bytes_;
  const bool owned_;
  uint64_t copies_ = 0;  // Enqueued and not done, and pins. Guarded by the device's mutex_.
};

// One chunk on its way to a device. `from` and `to` stay until `done` is called.
struct Copy {
  const std::byte* from = nullptr;
  Buffer* to = nullptr;
  uint64_t offset = 0;  // In the buffer.
  uint64_t length = 0;
  // Asked just before the copy begins; where it says no, the copy is dropped and `done` is called all the same, without
  // an error. From a thread of the device; must not throw.
  std::function<bool()> wanted;
  // Called once when the bytes have arrived or never will, always from the same thread of the device; must not throw.
  std::function<void(std::optional<Error>)> done;
};

class Device {
 public:
  Device(const char* library, int ordinal, unsigned streams);
  // No Buffer of it is left, so no copy is either.
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void describe(sllm_device_facts& facts);
  // Both count by device: a second time changes nothing, and the last device to leave undoes it. So does ~Device.
  void register_pool(const Pool& pool);
  void unregister_pool(const Pool& pool);
  // Queues a copy; never waits for the device. Whatever is wrong with it, `done` is told.
  void enqueue(Copy copy);

 private:
  friend class Buffer;

  // One retained primary context.
  struct Primary {
    Primary(const cuda::Driver& driver, int ordinal);
    ~Primary() { driver.cuDevicePrimaryCtxRelease(device); }
    Primary(const Primary&) = delete;
    Primary& operator=(const Primary&) = delete;

    const cuda::Driver& driver;
    cuda::Ordinal device = 0;
    cuda::Context context = nullptr;
  };
  // Where one copy at a time goes. Used in turn, and given free in turn.
  struct Slot {
    cuda::Stream stream;
    cuda::Event event;
  };
  struct Flight {
    Copy copy;
    std::optional<Slot> slot;  // None where it never began.
    std::optional<Error> failed;
  };
  struct Registration;
  struct Registry;

  void make_slots(unsigned streams);
  void drop_slots() noexcept;
  void stop() noexcept;
  void begin_copies();
  void finish_copies();
  void begin(Flight& flight, const Slot& slot);
  void launch(Flight& flight, const Slot& slot);
  void finish(Flight& flight);
  // The error for a call that failed; remembers one that nothing survives.
  Error failure(const std::string& what, cuda::Result result, sllm_code code = SLLM_DEVICE_FAILED);
  void check(cuda::Result result, const char* what);
  void check_alive();

  const int ordinal_;
  const Primary primary_;
  const cuda::Driver& driver_;
  std::vector<cuda::Stream> streams_;
  std::vector<Slot> slots_;
  std::mutex mutex_;
  std::condition_variable queued_;    // For the thread that begins copies.
  std::condition_variable flying_;    // For the thread that finishes them.
  std::condition_variable finished_;  // For ~Buffer.
  std::deque<Copy> queue_;            // Guarded by mutex_.
  std::deque<Flight> flights_;        // Guarded by mutex_. In the order in which they began.
  uint64_t begun_ = 0;                // Guarded by mutex_. How many copies have ever taken a slot,
  uint64_t ended_ = 0;                // Guarded by mutex_. and given it back.
  std::optional<Error> failed_;       // Guarded by mutex_. Why nothing works any more.
  bool stopping_ = false;             // Guarded by mutex_.
  bool no_more_ = false;              // Guarded by mutex_. No more flights will come.
  std::thread beginning_;
  std::thread finishing_;
};

// The Buffer inside of the C ABI's object.
Buffer* buffer_of(sllm_buffer* buffer);

}  // namespace sllm
