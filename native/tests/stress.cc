// stress drives the C ABI from several threads at once: loads, cancels, failures, and readers destroyed in mid-load.
// Meant to run under the sanitizers (see SLLM_SANITIZE in CMakeLists.txt); it checks every byte that it loads.
// Usage: stress FOLDER [ROUNDS] [SEED]. Thread safety, ownership: a program, owning what it makes in FOLDER.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sllm_native.h"

namespace {

constexpr uint64_t kChunkBytes = 64 * 1024;
constexpr uint64_t kChunksEach = 24;
constexpr int kClients = 6;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
      std::abort();                                                            \
    }                                                                          \
  } while (false)

unsigned char byte_at(uint64_t file, uint64_t offset) {
  return static_cast<unsigned char>((offset * 2654435761u >> 7) + file * 31 + (offset >> 16));
}

struct File {
  std::string path;
  uint64_t number;
  uint64_t size_bytes;
  int64_t mtime_ns;
  uint64_t inode;
};

File make_file(const std::string& folder, uint64_t number, uint64_t size_bytes) {
  File file{folder + "/file-" + std::to_string(number), number, size_bytes, 0, 0};
  std::vector<unsigned char> bytes(size_bytes);
  for (uint64_t at = 0; at < size_bytes; ++at) bytes[at] = byte_at(number, at);
  const int fd = open(file.path.c_str(), O_CREAT | O_TRUNC | O_RDWR, 0600);
  CHECK(fd >= 0 && write(fd, bytes.data(), size_bytes) == static_cast<ssize_t>(size_bytes) && fsync(fd) == 0);
  struct stat found {};
  CHECK(fstat(fd, &found) == 0);
  file.mtime_ns = static_cast<int64_t>(found.st_mtim.tv_sec) * 1'000'000'000 + found.st_mtim.tv_nsec;
  file.inode = found.st_ino;
  close(fd);
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

struct Counts {
  std::atomic<int> done{0}, cancelled{0}, failed{0};
};

// One load by one client, which owns chunks [first, first + kChunksEach) of the pool.
void load_once(sllm_reader* reader, int pool_fd, const std::vector<File>& files, uint64_t first, std::mt19937& random,
               Counts& counts) {
  const File& file = files[random() % files.size()];
  if (random() % 2) drop_cache(file);
  const bool lie = random() % 8 == 0;
  std::vector<uint64_t> chunks((file.size_bytes + kChunkBytes - 1) / kChunkBytes);
  for (uint64_t k = 0; k < chunks.size(); ++k) chunks[k] = first + k;
  const sllm_file described{file.path.c_str(), file.size_bytes, file.mtime_ns + (lie ? 1 : 0),
                            file.inode,        chunks.data(),   chunks.size()};
  sllm_error error{};
  uint64_t id = 0;
  CHECK(sllm_reader_submit(reader, &described, 1, &id, &error) == SLLM_OK);
  if (random() % 4 == 0) CHECK(sllm_reader_cancel(reader, id, &error) == SLLM_OK);
  sllm_load_status status{};
  do {
    pollfd event{sllm_reader_event_fd(reader), POLLIN, 0};
    poll(&event, 1, 1);
    eventfd_t seen;
    (void)eventfd_read(event.fd, &seen);
    CHECK(sllm_reader_status(reader, id, &status, &error) == SLLM_OK);
  } while (status.state == SLLM_LOADING);
  if (status.state == SLLM_DONE) {
    CHECK(!lie && status.cached_bytes + status.device_bytes == file.size_bytes);
    check_bytes(pool_fd, chunks, file);
    ++counts.done;
  } else if (status.state == SLLM_FAILED) {
    CHECK(lie && status.error.code == SLLM_CHANGED);
    ++counts.failed;
  } else {
    ++counts.cancelled;
  }
  CHECK(sllm_reader_forget(reader, id, &error) == SLLM_OK);
  CHECK(sllm_reader_forget(reader, id, &error) == SLLM_INVALID);
}

void abandon_loads(sllm_reader* reader, const std::vector<File>& files) {
  for (int client = 0; client < kClients; ++client) {
    const File& file = files[client % files.size()];
    drop_cache(file);
    std::vector<uint64_t> chunks((file.size_bytes + kChunkBytes - 1) / kChunkBytes);
    for (uint64_t k = 0; k < chunks.size(); ++k) chunks[k] = client * kChunksEach + k;
    const sllm_file described{file.path.c_str(), file.size_bytes, file.mtime_ns,
                              file.inode,        chunks.data(),   chunks.size()};
    sllm_error error{};
    uint64_t id = 0;
    CHECK(sllm_reader_submit(reader, &described, 1, &id, &error) == SLLM_OK);
  }
}

}  // namespace

int main(int count, char** arguments) {
  CHECK(count >= 2 && sllm_abi_version() == SLLM_ABI_VERSION);
  const int rounds = count > 2 ? std::atoi(arguments[2]) : 20;
  const unsigned seed = count > 3 ? static_cast<unsigned>(std::atoi(arguments[3])) : 1;
  std::vector<File> files;
  for (const uint64_t size : {uint64_t{1}, uint64_t{4096}, kChunkBytes - 1, kChunkBytes, kChunkBytes + 1,
                              5 * kChunkBytes + 4095, kChunksEach * kChunkBytes})
    files.push_back(make_file(arguments[1], files.size(), size));

  sllm_error error{};
  CHECK(sllm_pool_create(4097, 1, 1, 0, &error) == nullptr && error.code == SLLM_INVALID);
  sllm_pool* pool = sllm_pool_create(kChunkBytes, kClients * kChunksEach, 3, 1, &error);
  CHECK(pool != nullptr);
  sllm_pool_facts facts{};
  sllm_pool_get_facts(pool, &facts);
  CHECK(ftruncate(facts.fd, 0) != 0);

  Counts counts;
  for (int round = 0; round < rounds; ++round) {
    sllm_reader* reader = sllm_reader_create(pool, 1 + round % 4, kClients, &error);
    CHECK(reader != nullptr);
    std::vector<std::thread> clients;
    for (int client = 0; client < kClients; ++client)
      clients.emplace_back([&, client] {
        std::mt19937 random(seed * 1000 + round * 10 + client);
        for (int k = 0; k < 20; ++k) load_once(reader, facts.fd, files, client * kChunksEach, random, counts);
      });
    for (auto& client : clients) client.join();
    abandon_loads(reader, files);
    sllm_reader_destroy(reader);
  }
  sllm_pool_destroy(pool);
  for (const File& file : files) unlink(file.path.c_str());
  std::printf("%d loads done, %d cancelled, %d failed as they should\n", counts.done.load(), counts.cancelled.load(),
              counts.failed.load());
}
