#include "device.h"

#include <pthread.h>

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <utility>

namespace sllm {
namespace {

// The driver cuts small allocations out of blocks of this size, and an IPC handle gives away the whole block.
constexpr uint64_t kBlockBytes = 2ull << 20;
constexpr uint64_t kMaxBufferBytes = uint64_t{1} << 60;

std::string bytes_text(uint64_t bytes) { return std::to_string(bytes) + " bytes"; }

// A handle is long and mostly zeros: 64 bits of FNV-1a tell handles apart in a message.
std::string handle_name(const uint8_t* handle) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int k = 0; k < SLLM_HANDLE_BYTES; ++k) hash = (hash ^ handle[k]) * 0x100000001b3u;
  char text[32];
  std::snprintf(text, sizeof text, "handle #%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace

// ---- Pools that are page-locked for the driver: once each, whatever the number of devices. ----

struct Device::Registration {
  Registration(const cuda::Driver& driver, int ordinal) : primary(driver, ordinal) {}
  ~Registration() {
    if (!ours) return;
    // Nothing is left to be undone where the context is lost, so nothing here can fail in a way that matters.
    if (primary.driver.cuCtxPushCurrent(primary.context) != cuda::kSuccess) return;
    primary.driver.cuMemHostUnregister(base);
    cuda::Context popped = nullptr;
    primary.driver.cuCtxPopCurrent(&popped);
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

  // Held for itself: the driver forgets what was registered in a context when that context goes.
  const Primary primary;
  std::set<const Device*> users;
  void* base = nullptr;
  bool ours = false;  // Someone else in this process may have registered it before us: then it is not ours to undo.
};

struct Device::Registry {
  using Key = std::pair<const cuda::Driver*, const void*>;

  static Registry& get() {
    static auto& registry = *new Registry;  // Never destroyed: a device may be closed late.
    return registry;
  }
  void leave(const Device* device) {
    const std::lock_guard lock(mutex);
    for (auto at = pools.begin(); at != pools.end();) {
      at->second->users.erase(device);
      at = at->second->users.empty() ? pools.erase(at) : std::next(at);
    }
  }

  std::mutex mutex;
  std::map<Key, std::unique_ptr<Registration>> pools;  // Guarded by mutex.
};

void Device::register_pool(const Pool& pool) {
  check_alive();
  auto& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  const Registry::Key key{&driver_, pool.base()};
  if (const auto found = registry.pools.find(key); found != registry.pools.end()) {
    found->second->users.insert(this);
    return;
  }
  auto made = std::make_unique<Registration>(driver_, ordinal_);
  const cuda::Current current(driver_, made->primary.context);
  const uint64_t size_bytes = pool.size_bytes();
  const auto result = driver_.cuMemHostRegister(pool.base(), size_bytes, cuda::kHostRegisterPortable);
  if (result != cuda::kSuccess && result != cuda::kAlreadyRegistered) {
    const bool memory = result == cuda::kOutOfMemory;
    throw failure("page-locking the host pool of " + bytes_text(size_bytes), result,
                  memory ? SLLM_NO_MEMORY : SLLM_DEVICE_FAILED);
  }
  made->ours = result == cuda::kSuccess;
  made->base = pool.base();
  made->users.insert(this);
  registry.pools.emplace(key, std::move(made));
}

void Device::unregister_pool(const Pool& pool) {
  auto& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  const auto found = registry.pools.find({&driver_, pool.base()});
  if (found == registry.pools.end() || found->second->users.erase(this) == 0)
    throw Error(SLLM_INVALID, "device " + std::to_string(ordinal_) + ": this pool is not registered with it");
  if (found->second->users.empty()) registry.pools.erase(found);
}

// ---- Buffer ----

std::unique_ptr<Buffer> Buffer::create(Device& device, uint64_t size_bytes) {
  device.check_alive();
  if (size_bytes == 0 || size_bytes > kMaxBufferBytes)
    throw Error(SLLM_INVALID, "a device buffer of " + bytes_text(size_bytes));
  const auto& driver = device.driver_;
  const cuda::Current current(driver, device.primary_.context);
  cuda::Pointer address = 0;
  const auto result = driver.cuMemAlloc(&address, (size_bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes);
  if (result == cuda::kOutOfMemory) {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    device.check(driver.cuMemGetInfo(&free_bytes, &total_bytes), "cuMemGetInfo");
    throw device.failure(bytes_text(size_bytes) + " asked, " + bytes_text(free_bytes) + " free of " +
                             bytes_text(total_bytes),
                         result, SLLM_DEVICE_NO_MEMORY);
  }
  device.check(result, "cuMemAlloc");
  return std::unique_ptr<Buffer>(new Buffer(device, address, size_bytes, true));
}

std::unique_ptr<Buffer> Buffer::open(Device& device, const uint8_t* handle, uint64_t size_bytes) {
  device.check_alive();
  if (size_bytes == 0 || size_bytes > kMaxBufferBytes)
    throw Error(SLLM_INVALID, "a device buffer of " + bytes_text(size_bytes));
  const auto& driver = device.driver_;
  const cuda::Current current(driver, device.primary_.context);
  cuda::IpcHandle given;
  std::memcpy(&given, handle, sizeof given);
  cuda::Pointer address = 0;
  const auto result = driver.cuIpcOpenMemHandle(&address, given, cuda::kIpcLazyPeerAccess);
  if (result == cuda::kInvalidContext)
    throw device.failure(handle_name(handle) + " is of this very process, only another can open it", result,
                         SLLM_INVALID);
  if (result == cuda::kInvalidHandle || result == cuda::kInvalidValue)
    throw device.failure(handle_name(handle) + " is no handle of living device memory", result, SLLM_INVALID);
  if (result != cuda::kSuccess) throw device.failure("opening " + handle_name(handle), result);
  auto opened = std::unique_ptr<Buffer>(new Buffer(device, address, size_bytes, false));
  cuda::Pointer base = 0;
  size_t mapped_bytes = 0;
  if (driver.cuMemGetAddressRange(&base, &mapped_bytes, address) == cuda::kSuccess &&
      size_bytes > mapped_bytes - (address - base))
    throw Error(SLLM_INVALID, handle_name(handle) + " is of " + bytes_text(mapped_bytes - (address - base)) +
                                  ", not of " + bytes_text(size_bytes));
  return opened;
}

Buffer::Pin::Pin(Buffer& buffer) : buffer_(buffer) {
  const std::lock_guard lock(buffer_.device_.mutex_);
  ++buffer_.copies_;
}

Buffer::Pin::~Pin() {
  const std::lock_guard lock(buffer_.device_.mutex_);
  --buffer_.copies_;
  buffer_.device_.finished_.notify_all();
}

Buffer::~Buffer() {
  assert(std::this_thread::get_id() != device_.finishing_.get_id());
  {
    std::unique_lock lock(device_.mutex_);
    device_.finished_.wait(lock, [this] { return copies_ == 0; });
  }
  const auto& driver = device_.driver_;
  // A lost context has taken its memory with it, and there is nobody to tell.
  if (driver.cuCtxPushCurrent(device_.primary_.context) != cuda::kSuccess) return;
  owned_ ? driver.cuMemFree(address_) : driver.cuIpcCloseMemHandle(address_);
  cuda::Context popped = nullptr;
  driver.cuCtxPopCurrent(&popped);
}

void Buffer::export_to(uint8_t* handle) const {
  device_.check_alive();
  if (!owned_) throw Error(SLLM_INVALID, "a buffer that another process owns cannot be exported");
  const cuda::Current current(device_.driver_, device_.primary_.context);
  cuda::IpcHandle made;
  device_.check(device_.driver_.cuIpcGetMemHandle(&made, address_), "cuIpcGetMemHandle");
  std::memcpy(handle, &made, sizeof made);
}

void Buffer::read(uint64_t offset, uint64_t length, void* target) const {
  device_.check_alive();
  if (!holds(offset, length))
    throw Error(SLLM_INVALID, "reading " + bytes_text(length) + " at " + std::to_string(offset) +
                                  " of a device buffer of " + bytes_text(size_bytes_));
  if (length == 0) return;
  const cuda::Current current(device_.driver_, device_.primary_.context);
  device_.check(device_.driver_.cuMemcpyDtoH(target, address_ + offset, length), "cuMemcpyDtoH");
}

// ---- Device ----

Device::Primary::Primary(const cuda::Driver& from, int ordinal) : driver(from) {
  if (const int count = driver.device_count(); ordinal < 0 || ordinal >= count)
    throw Error(SLLM_NO_DEVICE, "no CUDA device " + std::to_string(ordinal) + ", there are " + std::to_string(count));
  driver.check(driver.cuDeviceGet(&device, ordinal), "cuDeviceGet");
  unsigned flags = 0;
  int active = 0;
  // Waiting threads are to sleep, not to spin. It can be chosen by whoever is first, and is only a wish.
  if (driver.cuDevicePrimaryCtxGetState(device, &flags, &active) == cuda::kSuccess && active == 0)
    driver.cuDevicePrimaryCtxSetFlags(device, cuda::kScheduleBlockingSync);
  const auto result = driver.cuDevicePrimaryCtxRetain(&context, device);
  if (result != cuda::kSuccess)
    throw driver.failure("device " + std::to_string(ordinal) + ": cuDevicePrimaryCtxRetain", result,
                         result == cuda::kOutOfMemory ? SLLM_DEVICE_NO_MEMORY : SLLM_DEVICE_FAILED);
}

Device::Device(const char* library, int ordinal, unsigned streams)
    : ordinal_(ordinal), primary_(cuda::Driver::get(library), ordinal), driver_(primary_.driver) {
  if (streams == 0 || streams > kMaxStreams)
    throw Error(SLLM_INVALID, "device: the number of streams is out of bounds");
  try {
    make_slots(streams);
    finishing_ = std::thread(&Device::finish_copies, this);
    beginning_ = std::thread(&Device::begin_copies, this);
  } catch (...) {
    stop();
    drop_slots();
    throw;
  }
}

Device::~Device() {
  assert(std::this_thread::get_id() != finishing_.get_id());
  stop();
  drop_slots();
  Registry::get().leave(this);
}

void Device::make_slots(unsigned streams) {
  const cuda::Current current(driver_, primary_.context);
  streams_.reserve(streams);
  slots_.reserve(streams * kCopiesPerStream);
  for (unsigned k = 0; k < streams; ++k) {
    cuda::Stream stream = nullptr;
    check(driver_.cuStreamCreate(&stream, cuda::kStreamNonBlocking), "cuStreamCreate");
    streams_.push_back(stream);
  }
  for (unsigned k = 0; k < streams * kCopiesPerStream; ++k) {
    cuda::Event event = nullptr;
    check(driver_.cuEventCreate(&event, cuda::kEventBlockingSync | cuda::kEventDisableTiming), "cuEventCreate");
    slots_.push_back({streams_[k % streams], event});
  }
}

void Device::drop_slots() noexcept {
  if (driver_.cuCtxPushCurrent(primary_.context) != cuda::kSuccess) return;
  for (const Slot& slot : slots_) driver_.cuEventDestroy(slot.event);
  for (const auto stream : streams_) driver_.cuStreamDestroy(stream);
  cuda::Context popped = nullptr;
  driver_.cuCtxPopCurrent(&popped);
}

void Device::stop() noexcept {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  queued_.notify_all();
  if (beginning_.joinable()) beginning_.join();
  {
    const std::lock_guard lock(mutex_);
    no_more_ = true;
  }
  flying_.notify_all();
  if (finishing_.joinable()) finishing_.join();
}

void Device::describe(sllm_device_facts& facts) {
  check_alive();
  facts = {};
  facts.ordinal = ordinal_;
  facts.driver_version = driver_.version();
  const cuda::Current current(driver_, primary_.context);
  check(driver_.cuDeviceGetName(facts.name, sizeof facts.name, primary_.device), "cuDeviceGetName");
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  check(driver_.cuMemGetInfo(&free_bytes, &total_bytes), "cuMemGetInfo");
  facts.free_bytes = free_bytes;
  check(driver_.cuDeviceTotalMem(&total_bytes, primary_.device), "cuDeviceTotalMem");
  facts.total_bytes = total_bytes;
}

void Device::enqueue(Copy copy) {
  assert(copy.to != nullptr && &copy.to->device() == this);
  {
    const std::lock_guard lock(mutex_);
    Buffer& to = *copy.to;
    queue_.push_back(std::move(copy));
    ++to.copies_;
  }
  queued_.notify_one();
}

// One thread begins, another waits for the oldest copy. Were they one, the bus would be idle from the end of a copy
// until that thread has been woken.
void Device::begin_copies() {
  pthread_setname_np(pthread_self(), "sllm-device");
  if (const auto result = driver_.cuCtxPushCurrent(primary_.context); result != cuda::kSuccess)
    failure("cuCtxPushCurrent", result);
  std::unique_lock lock(mutex_);
  while (true) {
    queued_.wait(lock, [this] {
      return queue_.empty() ? stopping_ : failed_ || begun_ - ended_ < slots_.size();
    });
    if (queue_.empty()) return;
    Flight flight{std::move(queue_.front()), std::nullopt, failed_};
    queue_.pop_front();
    const Slot slot = slots_[begun_ % slots_.size()];
    lock.unlock();
    if (!flight.failed) begin(flight, slot);
    lock.lock();
    if (flight.slot) ++begun_;
    flights_.push_back(std::move(flight));
    flying_.notify_one();
  }
}

void Device::begin(Flight& flight, const Slot& slot) {
  const Copy& copy = flight.copy;
  if (!copy.to->holds(copy.offset, copy.length))
    flight.failed = Error(SLLM_INVALID, "copying " + bytes_text(copy.length) + " to " + std::to_string(copy.offset) +
                                            " of a device buffer of " + bytes_text(copy.to->size_bytes()));
  else if (copy.length > 0 && (!copy.wanted || copy.wanted()))
    launch(flight, slot);
}

void Device::launch(Flight& flight, const Slot& slot) {
  const Copy& copy = flight.copy;
  const auto result =
      driver_.cuMemcpyHtoDAsync(copy.to->address() + copy.offset, copy.from, copy.length, slot.stream);
  if (result != cuda::kSuccess) {
    flight.failed = failure("cuMemcpyHtoDAsync of " + bytes_text(copy.length), result);
    return;
  }
  if (const auto recorded = driver_.cuEventRecord(slot.event, slot.stream); recorded != cuda::kSuccess) {
    // The copy is on its way and nothing would tell of its end.
    driver_.cuStreamSynchronize(slot.stream);
    flight.failed = failure("cuEventRecord", recorded);
    return;
  }
  flight.slot = slot;
}

void Device::finish_copies() {
  pthread_setname_np(pthread_self(), "sllm-device");
  if (const auto result = driver_.cuCtxPushCurrent(primary_.context); result != cuda::kSuccess)
    failure("cuCtxPushCurrent", result);
  std::unique_lock lock(mutex_);
  while (true) {
    flying_.wait(lock, [this] { return no_more_ || !flights_.empty(); });
    if (flights_.empty()) return;
    Flight flight = std::move(flights_.front());
    flights_.pop_front();
    lock.unlock();
    finish(flight);
    lock.lock();
    --flight.copy.to->copies_;
    finished_.notify_all();
  }
}

void Device::finish(Flight& flight) {
  if (flight.slot) {
    if (const auto result = driver_.cuEventSynchronize(flight.slot->event); result != cuda::kSuccess) {
      // Its chunk must not be given to others while the device may still read it.
      driver_.cuStreamSynchronize(flight.slot->stream);
      flight.failed = failure("copying " + bytes_text(flight.copy.length), result);
    }
    {
      const std::lock_guard lock(mutex_);
      ++ended_;
    }
    queued_.notify_one();
  }
  const auto done = std::move(flight.copy.done);
  flight.copy.wanted = nullptr;
  if (done) done(std::move(flight.failed));
}

Error Device::failure(const std::string& what, cuda::Result result, sllm_code code) {
  Error error = driver_.failure("device " + std::to_string(ordinal_) + ": " + what, result, code);
  if (cuda::ends_context(result)) {
    const std::lock_guard lock(mutex_);
    if (!failed_) failed_ = error;
    queued_.notify_all();
  }
  return error;
}

void Device::check(cuda::Result result, const char* what) {
  if (result != cuda::kSuccess)
    throw failure(what, result, result == cuda::kOutOfMemory ? SLLM_DEVICE_NO_MEMORY : SLLM_DEVICE_FAILED);
}

void Device::check_alive() {
  const std::lock_guard lock(mutex_);
  if (failed_) throw *failed_;
}

}  // namespace sllm
