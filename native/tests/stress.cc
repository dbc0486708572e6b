// stress drives the C ABI from several threads at once: loads to host memory and to a fake device, with digests, by
// priority, through windows; cancels, failures, and readers destroyed in mid-load.
// Meant to run under the sanitizers (see SLLM_SANITIZE in CMakeLists.txt); it checks every byte that it loads.
// Usage: stress FOLDER CUDA_LIBRARY [ROUNDS] [SEED]. Thread safety, ownership: a program, owning what it makes in FOLDER.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "sllm_native.h"

namespace {

constexpr uint64_t kChunkBytes = 64 * 1024;
constexpr uint64_t kChunksEach = 24;
constexpr uint64_t kDigestBytes = 16 * 1024;
constexpr uint64_t kWindow = 3;
constexpr int kClients = 6;

unsigned char byte_at(uint64_t file, uint64_t offset) {
  return static_cast<unsigned char>((offset * 2654435761u >> 7) + file * 31 + (offset >> 16));
}

struct File {
  std::string path;
  uint64_t number;
  uint64_t size_bytes;
  int64_t mtime_ns;
  uint64_t inode;
  std::vector<uint8_t> digests;
};

File make_file(const std::string& folder, uint64_t number, uint64_t size_bytes) {
  File file{folder + "/file-" + std::to_string(number), number, size_bytes, 0, 0, {}};
  std::vector<unsigned char> bytes(size_bytes);
  for (uint64_t at = 0; at < size_bytes; ++at) bytes[at] = byte_at(number, at);
  const int fd = open(file.path.c_str(), O_CREAT | O_TRUNC | O_RDWR, 0600);
  CHECK(fd >= 0 && write(fd, bytes.data(), size_bytes) == static_cast<ssize_t>(size_bytes) && fsync(fd) == 0);
  struct stat found {};
  CHECK(fstat(fd, &found) == 0);
  file.mtime_ns = static_cast<int64_t>(found.st_mtim.tv_sec) * 1'000'000'000 + found.st_mtim.tv_nsec;
  file.inode = found.st_ino;
  close(fd);
  file.digests.resize((size_bytes + kDigestBytes - 1) / kDigestBytes * 16);
  for (uint64_t at = 0; at < size_bytes; at += kDigestBytes)
    sllm_digest(bytes.data() + at, std::min(kDigestBytes, size_bytes - at), &file.digests[at / kDigestBytes * 16]);
  return file;
}

void drop_cache(const File& file) {
  const int fd = open(file.path.c_str(), O_RDONLY);
  CHECK(fd >= 0);
  (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  close(fd);
}

void check_bytes(int pool_fd, const std::vector<uint64_t>& chunks, const File& file) {
  sllm_error error{};
  void* address = nullptr;
  CHECK(sllm_map_chunks(pool_fd, kChunkBytes, chunks.data(), chunks.size(), 1, &address, &error) == SLLM_OK);
  auto* bytes = static_cast<unsigned char*>(address);
  for (uint64_t at = 0; at < file.size_bytes; at += 97) CHECK(bytes[at] == byte_at(file.number, at));
  CHECK(bytes[file.size_bytes - 1] == byte_at(file.number, file.size_bytes - 1));
  bytes[0] ^= 0xff;  // Private: the pool must not see it.
  CHECK(sllm_unmap(address, chunks.size() * kChunkBytes, &error) == SLLM_OK);
}

void check_bytes(sllm_buffer* buffer, uint64_t offset, const File& file) {
  std::vector<unsigned char> bytes(file.size_bytes);
  sllm_error error{};
  CHECK(sllm_buffer_read(buffer, offset, file.size_bytes, bytes.data(), &error) == SLLM_OK);
  for (uint64_t at = 0; at < file.size_bytes; ++at) CHECK(bytes[at] == byte_at(file.number, at));
}

struct Counts {
  std::atomic<int> done{0}, cancelled{0}, failed{0}, copied{0};
};

// What one client has for itself: chunks [first, first + kChunksEach) of the pool, and a part of the device buffer.
struct Client {
  sllm_reader* reader;
  int pool_fd;
  uint64_t first;
  sllm_buffer* buffer;
  uint64_t offset;
};

sllm_load_status wait_for(sllm_reader* reader, uint64_t id) {
  sllm_error error{};
  sllm_load_status status{};
  do {
    pollfd event{sllm_reader_event_fd(reader), POLLIN, 0};
    poll(&event, 1, 1);
    eventfd_t seen;
    (void)eventfd_read(event.fd, &seen);
    CHECK(sllm_reader_status(reader, id, &status, &error) == SLLM_OK);
  } while (status.state == SLLM_LOADING);
  CHECK(sllm_reader_forget(reader, id, &error) == SLLM_OK);
  CHECK(sllm_reader_forget(reader, id, &error) == SLLM_INVALID);
  return status;
}

std::vector<uint64_t> chunks_of(const File& file, uint64_t first) {
  std::vector<uint64_t> chunks((file.size_bytes + kChunkBytes - 1) / kChunkBytes);
  for (uint64_t k = 0; k < chunks.size(); ++k) chunks[k] = first + k;
  return chunks;
}

// Checks and copies again what a load has left in the pool.
void copy_resident(const Client& client, sllm_file described, const File& file) {
  described.target = client.buffer;
  described.target_offset = client.offset;
  sllm_load_options options{};
  options.resident = 1;
  options.digest_bytes = kDigestBytes;
  sllm_error error{};
  uint64_t id = 0;
  CHECK(sllm_reader_submit(client.reader, &described, 1, &options, &id, &error) == SLLM_OK);
  const sllm_load_status status = wait_for(client.reader, id);
  CHECK(status.state == SLLM_DONE && status.copied_bytes == file.size_bytes && status.device_bytes == 0);
  check_bytes(client.buffer, client.offset, file);
}

void load_once(const Client& client, const std::vector<File>& files, std::mt19937& random, Counts& counts) {
  const File& file = files[random() % files.size()];
  if (random() % 2) drop_cache(file);
  const bool lie = random() % 8 == 0;
  const bool damaged = !lie && random() % 8 == 0;
  const bool windowed = random() % 4 == 0;
  const bool to_device = windowed || random() % 2;
  const auto chunks = chunks_of(file, client.first);
  const auto window = std::vector<uint64_t>(chunks.begin(), chunks.begin() + std::min(kWindow, chunks.size()));
  auto digests = file.digests;
  if (damaged) digests[random() % digests.size()] ^= 1;
  sllm_file described{};
  described.path = file.path.c_str();
  described.size_bytes = file.size_bytes;
  described.mtime_ns = file.mtime_ns + (lie ? 1 : 0);
  described.inode = file.inode;
  described.chunks = windowed ? nullptr : chunks.data();
  described.chunk_count = windowed ? 0 : chunks.size();
  described.digests = digests.data();
  described.digest_count = digests.size() / 16;
  described.target = to_device ? client.buffer : nullptr;
  described.target_offset = client.offset;
  sllm_load_options options{};
  options.priority = static_cast<int32_t>(random() % 3);
  options.digest_bytes = kDigestBytes;
  options.window = windowed ? window.data() : nullptr;
  options.window_count = windowed ? window.size() : 0;
  sllm_error error{};
  uint64_t id = 0;
  CHECK(sllm_reader_submit(client.reader, &described, 1, &options, &id, &error) == SLLM_OK);
  CHECK(sllm_reader_set_priority(client.reader, id, static_cast<int32_t>(random() % 3), &error) == SLLM_OK);
  if (random() % 4 == 0) CHECK(sllm_reader_cancel(client.reader, id, &error) == SLLM_OK);
  const sllm_load_status status = wait_for(client.reader, id);
  if (status.state == SLLM_DONE) {
    CHECK(!lie && !damaged && status.cached_bytes + status.device_bytes == file.size_bytes);
    CHECK(status.copied_bytes == (to_device ? file.size_bytes : 0));
    if (to_device) check_bytes(client.buffer, client.offset, file);
    if (!windowed) {
      check_bytes(client.pool_fd, chunks, file);
      copy_resident(client, described, file);
    }
    ++counts.done;
    counts.copied += to_device;
  } else if (status.state == SLLM_FAILED) {
    CHECK((lie && status.error.code == SLLM_CHANGED) || (damaged && status.error.code == SLLM_DIGEST));
    ++counts.failed;
  } else {
    ++counts.cancelled;
  }
}

void abandon_loads(sllm_reader* reader, const std::vector<File>& files, sllm_buffer* buffer) {
  for (int client = 0; client < kClients; ++client) {
    const File& file = files[client % files.size()];
    drop_cache(file);
    const auto chunks = chunks_of(file, client * kChunksEach);
    sllm_file described{};
    described.path = file.path.c_str();
    described.size_bytes = file.size_bytes;
    described.mtime_ns = file.mtime_ns;
    described.inode = file.inode;
    described.chunks = chunks.data();
    described.chunk_count = chunks.size();
    described.target = client % 2 ? buffer : nullptr;
    described.target_offset = client * kChunksEach * kChunkBytes;
    const sllm_load_options options{};
    sllm_error error{};
    uint64_t id = 0;
    CHECK(sllm_reader_submit(reader, &described, 1, &options, &id, &error) == SLLM_OK);
  }
}

}  // namespace

int main(int count, char** arguments) {
  CHECK(count >= 3 && sllm_abi_version() == SLLM_ABI_VERSION);
  const int rounds = count > 3 ? std::atoi(arguments[3]) : 20;
  const unsigned seed = count > 4 ? static_cast<unsigned>(std::atoi(arguments[4])) : 1;
  std::vector<File> files;
  for (const uint64_t size : {uint64_t{1}, uint64_t{4096}, kChunkBytes - 1, kChunkBytes, kChunkBytes + 1,
                              5 * kChunkBytes + 4095, kChunksEach * kChunkBytes})
    files.push_back(make_file(arguments[1], files.size(), size));

  sllm_error error{};
  CHECK(sllm_pool_create(4097, 1, 1, 0, SLLM_SMALL_PAGES, &error) == nullptr && error.code == SLLM_INVALID);
  sllm_pool* pool = sllm_pool_create(kChunkBytes, kClients * kChunksEach, 3, 1, SLLM_HUGE_PAGES, &error);
  CHECK(pool != nullptr);
  sllm_pool_facts facts{};
  sllm_pool_get_facts(pool, &facts);
  CHECK(ftruncate(facts.fd, 0) != 0);
  sllm_device* device = sllm_device_open(arguments[2], 0, 3, &error);
  CHECK(device != nullptr && sllm_device_register(device, pool, &error) == SLLM_OK);
  sllm_buffer* buffer = sllm_buffer_create(device, kClients * kChunksEach * kChunkBytes, &error);
  CHECK(buffer != nullptr);

  Counts counts;
  for (int round = 0; round < rounds; ++round) {
    sllm_reader* reader = sllm_reader_create(pool, 1 + round % 4, kClients, round % 2, &error);
    CHECK(reader != nullptr);
    std::vector<std::thread> clients;
    for (uint64_t number = 0; number < kClients; ++number)
      clients.emplace_back([&, number] {
        std::mt19937 random(static_cast<unsigned>(seed * 1000 + round * 10 + number));
        const uint64_t first = number * kChunksEach;
        const Client client{reader, facts.fd, first, buffer, first * kChunkBytes};
        for (int k = 0; k < 20; ++k) load_once(client, files, random, counts);
      });
    for (auto& client : clients) client.join();
    sllm_reader_facts ways{};
    sllm_reader_get_facts(reader, &ways);
    CHECK(ways.copied.bytes > 0 && ways.copied.busy_s > 0);
    abandon_loads(reader, files, buffer);
    sllm_reader_destroy(reader);
  }
  sllm_buffer_destroy(buffer);
  sllm_device_close(device);
  sllm_pool_destroy(pool);
  for (const File& file : files) unlink(file.path.c_str());
  std::printf("%d loads done, %d of them to a device, %d cancelled, %d failed as they should\n", counts.done.load(),
              counts.copied.load(), counts.cancelled.load(), counts.failed.load());
}
