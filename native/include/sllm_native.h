// sllm_native: the C ABI of the byte mover. Files on disk go into host memory chunks; engines map those chunks.
//
// Purpose: everything that Python is too slow for when a checkpoint moves, and nothing else: no Python, no torch, no
// CUDA headers. A caller loads this library with dlopen (ctypes) and checks sllm_abi_version() first.
// Thread safety: every function may be called from any thread, except that a destroy must be the last call on its
// object and a pool must outlive its readers.
// Ownership: *_create gives an object that *_destroy takes back. Strings and arrays passed in are copied. File
// descriptors in the answers stay the library's; they are closed by destroy.
// Errors: a function that can fail fills `error` and returns a code (or a null pointer). No exception leaves.
#ifndef SLLM_NATIVE_H
#define SLLM_NATIVE_H

#include <stdint.h>

#if defined(SLLM_BUILDING)
#define SLLM_API __attribute__((visibility("default")))
#else
#define SLLM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SLLM_ABI_VERSION 1
#define SLLM_MESSAGE_BYTES 1024

enum sllm_code {
  SLLM_OK = 0,
  SLLM_INVALID = 1,      // An argument is out of bounds.
  SLLM_NO_MEMORY = 2,    // The machine did not give the memory or address space.
  SLLM_CHANGED = 3,      // A file is not the one that was described: size, mtime, inode, or gone.
  SLLM_READ_FAILED = 4,  // The filesystem answered with os_error.
  SLLM_BUSY = 5,         // max_loads loads are running.
  SLLM_INTERNAL = 6
};

enum sllm_state { SLLM_LOADING = 0, SLLM_DONE = 1, SLLM_FAILED = 2, SLLM_CANCELLED = 3 };

typedef struct sllm_error {
  int32_t code;
  int32_t os_error;  // errno where the system refused something, else 0.
  char message[SLLM_MESSAGE_BYTES];
} sllm_error;

SLLM_API uint32_t sllm_abi_version(void);

// ---- Host pool: one memfd of `chunks` chunks, faulted in and sealed against resizing when create returns. ----

typedef struct sllm_pool sllm_pool;

typedef struct sllm_pool_facts {
  int32_t fd;
  int32_t locked;  // 1 where mlock was asked for and held.
  uint64_t chunk_bytes;
  uint64_t chunks;
  uint64_t huge_bytes;  // How much of it the kernel maps with huge pages.
} sllm_pool_facts;

SLLM_API sllm_pool* sllm_pool_create(uint64_t chunk_bytes, uint64_t chunks, uint32_t fault_threads, int32_t lock,
                                     sllm_error* error);
SLLM_API void sllm_pool_get_facts(const sllm_pool* pool, sllm_pool_facts* facts);
SLLM_API void sllm_pool_destroy(sllm_pool* pool);

// ---- Reader: a few threads that read whole files into chunks of one pool. ----

typedef struct sllm_reader sllm_reader;

typedef struct sllm_file {
  const char* path;
  uint64_t size_bytes;
  int64_t mtime_ns;
  uint64_t inode;
  const uint64_t* chunks;  // ceil(size_bytes / chunk_bytes) chunk indexes, in file order.
  uint64_t chunk_count;
} sllm_file;

typedef struct sllm_load_status {
  int32_t state;          // sllm_state; past SLLM_LOADING no thread touches the load's chunks any more.
  int32_t failed_file;    // Index of the file that `error` is about.
  uint64_t cached_bytes;  // Taken from the page cache.
  uint64_t device_bytes;  // Asked of the device.
  uint64_t total_bytes;   // Size of all files.
  double elapsed_s;       // From submit until now, or until the end.
  sllm_error error;
} sllm_load_status;

SLLM_API sllm_reader* sllm_reader_create(sllm_pool* pool, uint32_t threads, uint32_t max_loads, sllm_error* error);
// An eventfd (non-blocking) that becomes readable whenever a load has advanced or ended.
SLLM_API int32_t sllm_reader_event_fd(const sllm_reader* reader);
// Queues a load; never waits for the disk. The caller keeps the chunks unused by others until the load has ended.
SLLM_API int32_t sllm_reader_submit(sllm_reader* reader, const sllm_file* files, uint64_t file_count, uint64_t* load_id,
                                    sllm_error* error);
SLLM_API int32_t sllm_reader_status(sllm_reader* reader, uint64_t load_id, sllm_load_status* status, sllm_error* error);
// Stops a load before its next chunk; it ends as SLLM_CANCELLED once the chunks being read have been read.
SLLM_API int32_t sllm_reader_cancel(sllm_reader* reader, uint64_t load_id, sllm_error* error);
// Forgets a load that has ended.
SLLM_API int32_t sllm_reader_forget(sllm_reader* reader, uint64_t load_id, sllm_error* error);
// Waits for the chunks being read, then joins the threads.
SLLM_API void sllm_reader_destroy(sllm_reader* reader);

// ---- Mapping: what an engine process does with the fd of a pool that lives elsewhere. ----

// Maps chunks one after another at one fresh address: private, writable, copy-on-write. The fd may be closed after.
SLLM_API int32_t sllm_map_chunks(int32_t fd, uint64_t chunk_bytes, const uint64_t* chunks, uint64_t chunk_count,
                                 int32_t populate, void** address, sllm_error* error);
SLLM_API int32_t sllm_unmap(void* address, uint64_t length_bytes, sllm_error* error);

#ifdef __cplusplus
}
#endif

#endif  // SLLM_NATIVE_H
