// device_test drives Device and Buffer over the fake CUDA driver: what copies do, how they fail, what is left behind.
// Meant to run plainly and under the sanitizers. No case waits by sleeping: the fake holds copies until it is told.
// Usage: device_test LIBRARY [CASE...]. Thread safety, ownership: a program, with a process of its own.
#include "device.h"

#include "check.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <utility>

namespace {

using sllm::Buffer;
using sllm::Copy;
using sllm::Device;
using sllm::Error;
using sllm::Pool;

constexpr uint64_t kChunkBytes = 64 * 1024;
constexpr unsigned kStreams = 3;
constexpr int kSlots = kStreams * sllm::kCopiesPerStream;
constexpr int kDevices = 2;
constexpr int64_t kLimitMs = 60'000;
constexpr int kInvalidValue = 1, kOutOfMemory = 2, kIllegalAddress = 700, kLaunchFailed = 719;

const char* library = nullptr;

template <typename Signature>
Signature* control(const char* name) {
  void* loaded = dlopen(library, RTLD_NOW);
  CHECK(loaded != nullptr);
  auto* found = reinterpret_cast<Signature*>(dlsym(loaded, name));
  CHECK(found != nullptr);
  return found;
}

void set(const char* name, int64_t value) {
  CHECK(control<int(const char*, int64_t)>("fake_cuda_set")(name, value) == 0);
}
int64_t get(const char* name) { return control<int64_t(const char*)>("fake_cuda_get")(name); }
void wait_for(const char* name, int64_t at_least) {
  CHECK(control<int(const char*, int64_t, int64_t)>("fake_cuda_wait")(name, at_least, kLimitMs) == 0);
}

// A pool whose every byte is known.
struct Chunks {
  explicit Chunks(uint64_t count) : pool(kChunkBytes, count, 1, false, SLLM_SMALL_PAGES) {
    for (uint64_t k = 0; k < count; ++k)
      for (uint64_t at = 0; at < kChunkBytes; ++at) pool.chunk(k)[at] = byte_at(k, at);
  }
  static std::byte byte_at(uint64_t chunk, uint64_t at) {
    return static_cast<std::byte>((at * 2654435761u >> 7) + chunk * 31 + 1);
  }
  Pool pool;
};

// What `done` was told, copy by copy.
class Outcomes {
 public:
  Copy copy(Chunks& chunks, uint64_t chunk, Buffer& to, uint64_t offset, uint64_t length = kChunkBytes) {
    return {chunks.pool.chunk(chunk), &to, offset, length, [this] { return wanted.load(); },
            [this](std::optional<Error> error) { add(std::move(error)); }};
  }
  void await(size_t count) {
    std::unique_lock lock(mutex_);
    CHECK(changed_.wait_for(lock, std::chrono::milliseconds(kLimitMs), [&] { return told_.size() >= count; }));
  }
  // Only when all have been awaited.
  const std::vector<std::optional<Error>>& told() const { return told_; }
  size_t failures() const {
    const auto failed = [](const auto& each) { return each.has_value(); };
    return static_cast<size_t>(std::count_if(told_.begin(), told_.end(), failed));
  }
  size_t threads() const { return threads_.size(); }

  std::atomic<bool> wanted{true};

 private:
  void add(std::optional<Error> error) {
    const std::lock_guard lock(mutex_);
    told_.push_back(std::move(error));
    threads_.insert(std::this_thread::get_id());
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::optional<Error>> told_;
  std::set<std::thread::id> threads_;
};

bool arrived(const Buffer& buffer, uint64_t chunk, uint64_t offset, uint64_t length = kChunkBytes) {
  std::vector<std::byte> found(length);
  buffer.read(offset, length, found.data());
  for (uint64_t at = 0; at < length; ++at)
    if (found[at] != Chunks::byte_at(chunk, at)) return false;
  return true;
}

Error raised(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& caught) {
    return caught;
  }
  std::fprintf(stderr, "an error was expected\n");
  std::abort();
}

bool says(const Error& error, std::string_view text) {
  return std::string_view(error.what()).find(text) != std::string_view::npos;
}

// ---- Copies that arrive ----

void copies_arrive_on_several_devices_at_once() {
  constexpr uint64_t kCount = 40;
  Chunks chunks(kCount);
  std::vector<std::thread> clients;
  for (int ordinal = 0; ordinal < kDevices; ++ordinal)
    clients.emplace_back([&chunks, ordinal] {
      Device device(library, ordinal, kStreams);
      device.register_pool(chunks.pool);
      const auto buffer = Buffer::create(device, kCount * kChunkBytes);
      CHECK(buffer->address() % 256 == 0);
      Outcomes outcomes;
      for (uint64_t k = 0; k < kCount; ++k)
        device.enqueue(outcomes.copy(chunks, k, *buffer, (kCount - 1 - k) * kChunkBytes, kChunkBytes - k));
      outcomes.await(kCount);
      CHECK(outcomes.failures() == 0 && outcomes.threads() == 1);
      for (uint64_t k = 0; k < kCount; ++k)
        CHECK(arrived(*buffer, k, (kCount - 1 - k) * kChunkBytes, kChunkBytes - k));
    });
  for (auto& client : clients) client.join();
  CHECK(get("copies_done_0") == kCount && get("copies_done_1") == kCount && get("synchronous") == 0);
}

void few_copies_are_on_their_way() {
  constexpr uint64_t kCount = 5 * kSlots;
  Chunks chunks(kCount);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  const auto buffer = Buffer::create(device, kCount * kChunkBytes);
  Outcomes outcomes;
  const int64_t before = get("copies_enqueued");
  set("hold", 1);
  for (uint64_t k = 0; k < kCount; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  wait_for("copies_enqueued", before + kSlots);
  CHECK(get("copies_enqueued") == before + kSlots);
  set("hold", 0);
  outcomes.await(kCount);
  CHECK(get("max_outstanding") == sllm::kCopiesPerStream);
  CHECK(outcomes.failures() == 0 && arrived(*buffer, kCount - 1, (kCount - 1) * kChunkBytes));
}

void slow_copies_arrive() {
  Chunks chunks(8);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  const auto buffer = Buffer::create(device, 8 * kChunkBytes);
  Outcomes outcomes;
  set("delay_us", 2000);
  for (uint64_t k = 0; k < 8; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  outcomes.await(8);
  set("delay_us", 0);
  for (uint64_t k = 0; k < 8; ++k) CHECK(arrived(*buffer, k, k * kChunkBytes));
}

void memory_that_is_not_registered_is_copied_too() {
  Chunks chunks(2);
  Device device(library, 0, kStreams);
  const auto buffer = Buffer::create(device, 2 * kChunkBytes);
  Outcomes outcomes;
  const int64_t before = get("synchronous");
  for (uint64_t k = 0; k < 2; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  outcomes.await(2);
  CHECK(get("synchronous") == before + 2 && arrived(*buffer, 0, 0) && arrived(*buffer, 1, kChunkBytes));
}

void what_is_not_wanted_is_dropped() {
  constexpr uint64_t kCount = 3 * kSlots;
  Chunks chunks(kCount);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  const auto buffer = Buffer::create(device, kCount * kChunkBytes);
  Outcomes outcomes;
  const int64_t before = get("copies_enqueued");
  set("hold", 1);
  for (uint64_t k = 0; k < kCount; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  wait_for("copies_enqueued", before + kSlots);
  outcomes.wanted = false;
  set("hold", 0);
  outcomes.await(kCount);
  // The thread may have asked for one more just before it was not wanted, but no slot was free for it.
  CHECK(get("copies_enqueued") == before + kSlots && outcomes.failures() == 0);
  CHECK(arrived(*buffer, 0, 0) && !arrived(*buffer, kCount - 1, (kCount - 1) * kChunkBytes));
}

void a_buffer_waits_for_the_copies_into_it() {
  constexpr uint64_t kCount = 2 * kSlots;
  Chunks chunks(kCount);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  auto buffer = Buffer::create(device, kCount * kChunkBytes);
  const auto other = Buffer::create(device, kChunkBytes);
  Outcomes outcomes;
  const int64_t before = get("copies_enqueued");
  set("hold", 1);
  for (uint64_t k = 0; k < kCount; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  wait_for("copies_enqueued", before + kSlots);
  std::thread closing([&] { buffer.reset(); });
  set("hold", 0);
  closing.join();
  CHECK(outcomes.told().size() == kCount && outcomes.failures() == 0);
}

// ---- Copies that fail ----

void a_copy_beyond_its_buffer_is_refused() {
  Chunks chunks(1);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  const auto buffer = Buffer::create(device, kChunkBytes + 1);
  Outcomes outcomes;
  device.enqueue(outcomes.copy(chunks, 0, *buffer, 2));
  device.enqueue(outcomes.copy(chunks, 0, *buffer, ~uint64_t{0}));
  device.enqueue(outcomes.copy(chunks, 0, *buffer, kChunkBytes + 1, 0));
  device.enqueue(outcomes.copy(chunks, 0, *buffer, 1));
  outcomes.await(4);
  CHECK(outcomes.told()[0]->code() == SLLM_INVALID && outcomes.told()[1]->code() == SLLM_INVALID);
  CHECK(!outcomes.told()[2] && !outcomes.told()[3] && arrived(*buffer, 0, 1));
  std::byte byte{};
  CHECK(raised([&] { buffer->read(kChunkBytes + 1, 1, &byte); }).code() == SLLM_INVALID);
}

void a_copy_that_fails_at_once_fails_alone() {
  Chunks chunks(4);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  const auto buffer = Buffer::create(device, 4 * kChunkBytes);
  Outcomes outcomes;
  set("fail_enqueue_at", 2);
  for (uint64_t k = 0; k < 4; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  outcomes.await(4);
  CHECK(outcomes.failures() == 1 && outcomes.told()[1].has_value());
  const Error& error = *outcomes.told()[1];
  CHECK(error.code() == SLLM_DEVICE_FAILED && error.os_error() == kInvalidValue);
  CHECK(says(error, "CUDA_ERROR_INVALID_VALUE (1): invalid argument") && says(error, "device 0"));
  CHECK(arrived(*buffer, 3, 3 * kChunkBytes) && !arrived(*buffer, 1, kChunkBytes));
}

void a_copy_whose_end_nobody_can_tell_fails_alone() {
  Chunks chunks(4);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  const auto buffer = Buffer::create(device, 4 * kChunkBytes);
  Outcomes outcomes;
  set("fail_record_at", 2);
  for (uint64_t k = 0; k < 4; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  outcomes.await(4);
  CHECK(outcomes.failures() == 1 && outcomes.told()[1].has_value() && says(*outcomes.told()[1], "cuEventRecord"));
}

// After an error that ends the context, everything fails with its reason, until the device is opened anew.
void all_fails_once_the_context_is_lost(const char* knob, int result, size_t count_before) {
  constexpr uint64_t kCount = 4 * kSlots;
  Chunks chunks(kCount);
  {
    Device device(library, 1, kStreams);
    device.register_pool(chunks.pool);
    Device healthy(library, 0, kStreams);
    healthy.register_pool(chunks.pool);
    const auto buffer = Buffer::create(device, kCount * kChunkBytes);
    Outcomes outcomes;
    set("fail_result", result);
    set(knob, static_cast<int64_t>(count_before) + 1);
    for (uint64_t k = 0; k < kCount; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
    outcomes.await(kCount);
    set("fail_result", 0);
    CHECK(outcomes.failures() >= kCount - count_before);
    const int64_t before = get("copies_asked");
    device.enqueue(outcomes.copy(chunks, 0, *buffer, 0));
    outcomes.await(kCount + 1);
    for (const auto& told : outcomes.told())
      CHECK(!told || (told->code() == SLLM_DEVICE_FAILED && told->os_error() == result && says(*told, "device 1")));
    CHECK(outcomes.told().back().has_value() && get("copies_asked") == before);
    sllm_device_facts facts;
    std::byte byte{};
    CHECK(raised([&] { device.describe(facts); }).os_error() == result);
    CHECK(raised([&] { Buffer::create(device, 1); }).os_error() == result);
    CHECK(raised([&] { buffer->read(0, 1, &byte); }).os_error() == result);
    const auto elsewhere = Buffer::create(healthy, kChunkBytes);
    Outcomes there;
    healthy.enqueue(there.copy(chunks, 0, *elsewhere, 0));
    there.await(1);
    CHECK(there.failures() == 0 && arrived(*elsewhere, 0, 0));
  }
  Device again(library, 1, kStreams);
  const auto buffer = Buffer::create(again, kChunkBytes);
  Outcomes outcomes;
  again.enqueue(outcomes.copy(chunks, 0, *buffer, 0));
  outcomes.await(1);
  CHECK(outcomes.failures() == 0);
}

void a_context_lost_at_once_fails_all() { all_fails_once_the_context_is_lost("fail_enqueue_at", kLaunchFailed, 3); }
void a_context_lost_on_the_way_fails_all() { all_fails_once_the_context_is_lost("fail_async_at", kIllegalAddress, 3); }
void a_context_lost_by_the_first_copy_fails_all() { all_fails_once_the_context_is_lost("fail_async_at", 214, 0); }

void a_context_lost_frees_who_waits() {
  Chunks chunks(kSlots);
  Device device(library, 0, kStreams);
  device.register_pool(chunks.pool);
  auto buffer = Buffer::create(device, kSlots * kChunkBytes);
  Outcomes outcomes;
  const int64_t before = get("copies_enqueued");
  set("hold", 1);
  for (uint64_t k = 0; k < kSlots; ++k) device.enqueue(outcomes.copy(chunks, k, *buffer, k * kChunkBytes));
  wait_for("copies_enqueued", before + kSlots);
  std::thread closing([&] { buffer.reset(); });
  control<void(int, int)>("fake_cuda_lose")(0, kLaunchFailed);
  closing.join();
  set("hold", 0);
  CHECK(outcomes.told().size() == kSlots && outcomes.failures() == kSlots);
}

// ---- Memory and pools ----

void out_of_memory_tells_the_sizes() {
  Device device(library, 0, 1);
  const auto half = Buffer::create(device, 512 << 20);
  const Error error = raised([&] { Buffer::create(device, (512 << 20) + 1); });
  CHECK(error.code() == SLLM_DEVICE_NO_MEMORY && error.os_error() == kOutOfMemory);
  CHECK(says(error, "536870913 bytes asked, 536870912 bytes free of 1073741824 bytes"));
  const auto rest = Buffer::create(device, 512 << 20);
  CHECK(raised([&] { Buffer::create(device, 0); }).code() == SLLM_INVALID);
  CHECK(raised([&] { Buffer::create(device, ~uint64_t{0}); }).code() == SLLM_INVALID);
}

void a_pool_is_registered_once_for_all_devices() {
  Chunks chunks(4);
  auto first = std::make_unique<Device>(library, 0, 1);
  Device second(library, 1, 1);
  first->register_pool(chunks.pool);
  first->register_pool(chunks.pool);
  second.register_pool(chunks.pool);
  CHECK(get("registrations") == 1);
  first.reset();  // It was made in the context of this one, and must outlast it.
  CHECK(get("registrations") == 1);
  const auto buffer = Buffer::create(second, kChunkBytes);
  const int64_t before = get("synchronous");
  Outcomes outcomes;
  second.enqueue(outcomes.copy(chunks, 0, *buffer, 0));
  outcomes.await(1);
  CHECK(get("synchronous") == before);
  second.unregister_pool(chunks.pool);
  CHECK(get("registrations") == 0 && get("contexts") == 1);
  CHECK(raised([&] { second.unregister_pool(chunks.pool); }).code() == SLLM_INVALID);
}

void a_pool_that_cannot_be_registered_is_an_error_to_go_on_from() {
  Chunks chunks(1);
  Device device(library, 0, 1);
  set("register_result", kOutOfMemory);
  CHECK(raised([&] { device.register_pool(chunks.pool); }).code() == SLLM_NO_MEMORY);
  set("register_result", 801);
  const Error error = raised([&] { device.register_pool(chunks.pool); });
  CHECK(error.code() == SLLM_DEVICE_FAILED && error.os_error() == 801 && get("contexts") == 1);
  set("register_result", 0);
  device.register_pool(chunks.pool);
  CHECK(get("registrations") == 1);
}

void a_pool_that_someone_else_registered_stays_theirs() {
  Chunks chunks(1);
  Device device(library, 0, 1);
  set("register_result", 712);
  device.register_pool(chunks.pool);
  set("register_result", 0);
  const int64_t before = get("refused");
  device.unregister_pool(chunks.pool);
  CHECK(get("refused") == before);  // Undoing it would have been refused, as nothing is registered.
}

void a_device_that_is_not_there_is_said_so() {
  const Error error = raised([] { Device device(library, kDevices, 1); });
  CHECK(error.code() == SLLM_NO_DEVICE && says(error, "there are 2"));
  CHECK(raised([] { Device device(library, -1, 1); }).code() == SLLM_NO_DEVICE);
  CHECK(raised([] { Device device("libno-such-cuda.so.1", 0, 1); }).code() == SLLM_NO_DEVICE);
  CHECK(raised([] { Device device(library, 0, 0); }).code() == SLLM_INVALID);
  CHECK(raised([] { Device device(library, 0, sllm::kMaxStreams + 1); }).code() == SLLM_INVALID);
  set("retain_result", kOutOfMemory);
  CHECK(raised([] { Device device(library, 0, 1); }).code() == SLLM_DEVICE_NO_MEMORY);
  set("retain_result", 0);
}

// ---- Everything at once, for the sanitizers ----

void many_clients_at_once() {
  constexpr int kClients = 4;
  constexpr uint64_t kEach = 8;
  Chunks chunks(kClients * kEach);
  std::vector<std::unique_ptr<Device>> devices;
  for (int ordinal = 0; ordinal < kDevices; ++ordinal) {
    devices.push_back(std::make_unique<Device>(library, ordinal, kStreams));
    devices.back()->register_pool(chunks.pool);
  }
  std::vector<std::thread> clients;
  for (int client = 0; client < kClients; ++client)
    clients.emplace_back([&, client] {
      std::mt19937 random(static_cast<unsigned>(client));
      for (int round = 0; round < 30; ++round) {
        Device& device = *devices[random() % devices.size()];
        Outcomes outcomes;
        auto buffer = Buffer::create(device, kEach * kChunkBytes);
        const bool cancel = random() % 3 == 0;
        const uint64_t first = static_cast<uint64_t>(client) * kEach;
        for (uint64_t k = 0; k < kEach; ++k) {
          device.enqueue(outcomes.copy(chunks, first + k, *buffer, k * kChunkBytes));
          if (cancel && k == random() % kEach) outcomes.wanted = false;
        }
        if (random() % 3 == 0) {
          buffer.reset();
          CHECK(outcomes.told().size() == kEach);
        } else {
          outcomes.await(kEach);
          for (uint64_t k = 0; k < kEach && !cancel; ++k) CHECK(arrived(*buffer, first + k, k * kChunkBytes));
          buffer.reset();
        }
        CHECK(outcomes.failures() == 0);
        // Its own chunks are the client's again: the sanitizer would see a copy that still reads them.
        for (uint64_t k = 0; k < kEach; ++k) chunks.pool.chunk(first + k)[0] = Chunks::byte_at(first + k, 0);
      }
    });
  for (auto& client : clients) client.join();
}

struct Case {
  const char* name;
  void (*run)();
};

#define CASE(name) {#name, name}
const Case kCases[] = {
    CASE(copies_arrive_on_several_devices_at_once),
    CASE(few_copies_are_on_their_way),
    CASE(slow_copies_arrive),
    CASE(memory_that_is_not_registered_is_copied_too),
    CASE(what_is_not_wanted_is_dropped),
    CASE(a_buffer_waits_for_the_copies_into_it),
    CASE(a_copy_beyond_its_buffer_is_refused),
    CASE(a_copy_that_fails_at_once_fails_alone),
    CASE(a_copy_whose_end_nobody_can_tell_fails_alone),
    CASE(a_context_lost_at_once_fails_all),
    CASE(a_context_lost_on_the_way_fails_all),
    CASE(a_context_lost_by_the_first_copy_fails_all),
    CASE(a_context_lost_frees_who_waits),
    CASE(out_of_memory_tells_the_sizes),
    CASE(a_pool_is_registered_once_for_all_devices),
    CASE(a_pool_that_cannot_be_registered_is_an_error_to_go_on_from),
    CASE(a_pool_that_someone_else_registered_stays_theirs),
    CASE(a_device_that_is_not_there_is_said_so),
    CASE(many_clients_at_once),
};

}  // namespace

int main(int count, char** arguments) {
  CHECK(count >= 2);
  library = arguments[1];
  setenv("FAKE_CUDA_DEVICES", std::to_string(kDevices).c_str(), 1);
  const std::set<std::string> chosen(arguments + 2, arguments + count);
  int passed = 0;
  for (const auto& [name, run] : kCases) {
    if (!chosen.empty() && !chosen.contains(name)) continue;
    std::fprintf(stderr, "%s\n", name);
    run();
    for (const char* counter : {"contexts", "allocations", "imports", "registrations", "streams", "events", "stack",
                                "refused", "abandoned"})
      if (get(counter) != 0) {
        std::fprintf(stderr, "%s: %lld %s left behind\n", name, static_cast<long long>(get(counter)), counter);
        std::abort();
      }
    ++passed;
  }
  CHECK(passed > 0);
  std::printf("%d cases passed\n", passed);
}
