#include "reader.h"

#include <pthread.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <exception>
#include <utility>

namespace sllm {
namespace {

constexpr unsigned kMaxThreads = 256;

}  // namespace

Reader::Reader(Pool& pool, unsigned threads, unsigned max_loads, bool use_ring)
    : pool_(pool),
      max_loads_(max_loads),
      event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      ring_(use_ring && threads <= kMaxThreads ? Ring::open(pool, std::max(threads, 1u)) : nullptr) {
  if (!event_.open()) throw Error(SLLM_NO_MEMORY, "reader: eventfd", errno);
  if (threads == 0 || threads > kMaxThreads || max_loads == 0)
    throw Error(SLLM_INVALID, "reader: the number of threads or loads is out of bounds");
  try {
    for (unsigned k = 0; k < threads; ++k) {
      threads_.emplace_back([this] { work(); });
      // As top and gdb will show it, from the moment that there is a reader.
      pthread_setname_np(threads_.back().native_handle(), "sllm-reader");
    }
  } catch (...) {
    stop_threads();
    throw;
  }
}

Reader::~Reader() {
  stop_threads();
  // What a device has begun with calls back here.
  std::unique_lock lock(mutex_);
  for (const auto& [id, load] : loads_) load->stop();
  quiet_.wait(lock, [this] { return copying_ == 0; });
}

void Reader::stop_threads() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

uint64_t Reader::submit(LoadPlan plan) {
  auto load = std::make_shared<Load>(std::move(plan), pool_, ring_.get(), meters_);
  const std::lock_guard lock(mutex_);
  if (loads_.size() >= max_loads_) throw Error(SLLM_BUSY, "too many loads at once");
  make_runnable(load);
  loads_.emplace(next_id_, std::move(load));
  wake_.notify_all();
  return next_id_++;
}

void Reader::status(uint64_t load_id, sllm_load_status& status) {
  const std::lock_guard lock(mutex_);
  find(load_id)->describe(status);
}

void Reader::set_priority(uint64_t load_id, int priority) {
  const std::lock_guard lock(mutex_);
  find(load_id)->priority = priority;
}

void Reader::drop_targets(uint64_t load_id) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Load> load = find(load_id);
  load->drop_targets();
  settle(load, lock);
}

void Reader::cancel(uint64_t load_id) {
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Load> load = find(load_id);
  if (load->ended()) return;
  load->stop();
  settle(load, lock);
}

void Reader::forget(uint64_t load_id) {
  const std::lock_guard lock(mutex_);
  if (!find(load_id)->ended()) throw Error(SLLM_INVALID, "a load that has not ended can't be forgotten");
  loads_.erase(load_id);
}

sllm_reader_facts Reader::facts() const {
  return {meters_.cached.facts(), meters_.storage.facts(), meters_.copied.facts(), ring_ != nullptr ? 1 : 0};
}

const std::shared_ptr<Load>& Reader::find(uint64_t load_id) const {
  const auto found = loads_.find(load_id);
  if (found == loads_.end()) throw Error(SLLM_INVALID, "no such load");
  return found->second;
}

void Reader::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !runnable_.empty(); });
    if (stopping_) return;
    run_next(lock);
  }
}

void Reader::make_runnable(const std::shared_ptr<Load>& load) {
  if (load->has_next() && std::find(runnable_.begin(), runnable_.end(), load) == runnable_.end())
    runnable_.push_back(load);
}

// The one of the highest priority that has waited longest.
std::shared_ptr<Load> Reader::take_runnable() {
  const auto next = std::max_element(runnable_.begin(), runnable_.end(), [](const auto& one, const auto& other) {
    return one->priority < other->priority;
  });
  std::shared_ptr<Load> load = std::move(*next);
  runnable_.erase(next);
  return load;
}

// Fetches one chunk of the load whose turn it is; the lock is free while the disk works.
void Reader::run_next(std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Load> load = take_runnable();
  const Load::Item item = load->begin_next();
  make_runnable(load);
  lock.unlock();

  BytesRead bytes;
  std::optional<Error> error;
  try {
    bytes = load->fetch(item, pool_.chunk(item.slot));
  } catch (const Error& caught) {
    error.emplace(caught);
  } catch (const std::exception& caught) {
    error.emplace(SLLM_INTERNAL, caught.what());
  }

  lock.lock();
  load->fetched(bytes);
  if (error) {
    load->fail(item, std::move(*error));
  } else if (!load->has_target(item)) {
    load->complete(item);
  } else if (load->wanted()) {
    send(load, item, lock);
    return;
  } else {
    load->drop(item);
  }
  settle(load, lock);
}

void Reader::send(const std::shared_ptr<Load>& load, const Load::Item& item, std::unique_lock<std::mutex>& lock) {
  ++copying_;
  // Who cancels the load, or drops its targets, may destroy them then: this one is still to be waited for.
  const Buffer::Pin pin(*load->target_of(item));
  lock.unlock();
  meters_.copied.begin();
  try {
    Copy copy = load->copy_of(item, pool_.chunk(item.slot));
    copy.wanted = [load] { return load->copies_wanted(); };
    copy.done = [this, load, item](std::optional<Error> error) { arrived(load, item, std::move(error)); };
    copy.to->device().enqueue(std::move(copy));
  } catch (const std::exception& caught) {
    arrived(load, item, Error(SLLM_DEVICE_FAILED, caught.what()));
  }
  lock.lock();
}

// A copy has ended; called by a device's thread.
void Reader::arrived(const std::shared_ptr<Load>& load, const Load::Item& item, std::optional<Error> error) {
  std::unique_lock lock(mutex_);
  // What was wanted to the end was not dropped on the way.
  const bool there = !error && load->copies_wanted();
  meters_.copied.end(there ? item.length : 0);
  if (load->wanted() && (there || load->targets_dropped()))
    load->complete(item);
  else if (error)
    load->fail(item, std::move(*error));
  else
    load->drop(item);
  settle(load, lock);
  if (--copying_ == 0) quiet_.notify_all();
}

// What follows when something of a load has ended: its next chunk, or its own end.
void Reader::settle(const std::shared_ptr<Load>& load, std::unique_lock<std::mutex>& lock) {
  if (!load->wanted()) {
    std::erase(runnable_, load);
  } else if (load->has_next()) {
    make_runnable(load);
    wake_.notify_one();
  }
  if (load->begin_end()) {
    // Files are closed before the end is announced, so that a load that has ended holds nothing.
    auto files = load->take_files();
    lock.unlock();
    files.clear();
    lock.lock();
    load->end();
  }
  notify();
}

void Reader::notify() const noexcept {
  // Refused only when the counter is full, and then the event is readable anyway.
  (void)eventfd_write(event_.get(), 1);
}

}  // namespace sllm
