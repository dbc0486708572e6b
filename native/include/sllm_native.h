// sllm_native: the C ABI of the byte mover. Files on disk go into host memory chunks, and on to device memory;
// engines map those chunks, or own that device memory.
//
// Purpose: everything that Python is too slow for when a checkpoint moves, and nothing else: no Python, no torch, no
// CUDA headers. A caller loads this library with dlopen (ctypes) and checks sllm_abi_version() first.
// Thread safety: every function may be called from any thread, except that a destroy must be the last call on its
// object; a pool must outlive its readers and the devices it is registered with, a buffer the loads into it, a device
// its buffers.
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

#define SLLM_ABI_VERSION 2
#define SLLM_MESSAGE_BYTES 8192  // Two paths of the longest kind, and why.

enum sllm_code {
  SLLM_OK = 0,
  SLLM_INVALID = 1,      // An argument is out of bounds.
  SLLM_NO_MEMORY = 2,    // The machine did not give the memory or address space.
  SLLM_CHANGED = 3,      // A file is not the one that was described: size, mtime, inode, or gone.
  SLLM_READ_FAILED = 4,  // The filesystem answered with os_error.
  SLLM_BUSY = 5,         // max_loads loads are running.
  SLLM_INTERNAL = 6,
  SLLM_DIGEST = 7,            // A chunk's bytes have another digest than was given.
  SLLM_NO_DEVICE = 8,         // No CUDA driver here, or no such device.
  SLLM_DEVICE_NO_MEMORY = 9,  // The device does not have the memory.
  SLLM_DEVICE_FAILED = 10     // The driver refused or failed; os_error is its CUresult.
};

enum sllm_state { SLLM_LOADING = 0, SLLM_DONE = 1, SLLM_FAILED = 2, SLLM_CANCELLED = 3 };

typedef struct sllm_error {
  int32_t code;
  int32_t os_error;  // errno where the system refused something, CUresult where the driver did, else 0.
  char message[SLLM_MESSAGE_BYTES];
} sllm_error;

SLLM_API uint32_t sllm_abi_version(void);

// XXH3-128 of `length` bytes, seed 0, in canonical (big-endian) form: 16 bytes into `digest`.
SLLM_API void sllm_digest(const void* data, uint64_t length, uint8_t* digest);

// ---- Host pool: one memfd of `chunks` chunks, faulted in and sealed against resizing when create returns. ----

typedef struct sllm_pool sllm_pool;

// What pages a pool is to have. SLLM_HUGE_PAGES takes reserved ones (MFD_HUGETLB) where enough are, else as many as the
// kernel can put together (MADV_COLLAPSE, Linux 6.1), else small ones.
enum sllm_pages { SLLM_SMALL_PAGES = 0, SLLM_HUGE_PAGES = 1 };

typedef struct sllm_pool_facts {
  int32_t fd;
  int32_t locked;    // 1 where mlock was asked for and held.
  int32_t reserved;  // 1 where its pages are reserved huge pages: a private write to one may find none left.
  uint64_t chunk_bytes;
  uint64_t chunks;
  uint64_t huge_bytes;  // How much of it the kernel maps with huge pages.
} sllm_pool_facts;

SLLM_API sllm_pool* sllm_pool_create(uint64_t chunk_bytes, uint64_t chunks, uint32_t fault_threads, int32_t lock,
                                     int32_t pages, sllm_error* error);
SLLM_API void sllm_pool_get_facts(const sllm_pool* pool, sllm_pool_facts* facts);
SLLM_API void sllm_pool_destroy(sllm_pool* pool);

// ---- Device: one CUDA device by the driver API, found by dlopen; several streams of copies, and buffers. ----

typedef struct sllm_device sllm_device;
typedef struct sllm_buffer sllm_buffer;

#define SLLM_HANDLE_BYTES 64

typedef struct sllm_device_facts {
  int32_t ordinal;
  int32_t driver_version;  // As cuDriverGetVersion has it: 13000 is 13.0.
  uint64_t total_bytes;
  uint64_t free_bytes;
  char name[256];
} sllm_device_facts;

// `library` is what dlopen gets, NULL for "libcuda.so.1".
SLLM_API int32_t sllm_device_count(const char* library, int32_t* count, sllm_error* error);
// Retains the device's primary context. Copies go round `streams` streams.
SLLM_API sllm_device* sllm_device_open(const char* library, int32_t ordinal, uint32_t streams, sllm_error* error);
SLLM_API int32_t sllm_device_get_facts(sllm_device* device, sllm_device_facts* facts, sllm_error* error);
// Page-locks the pool for the driver, for every device at once; without it copies are slower. A second time is no error.
SLLM_API int32_t sllm_device_register(sllm_device* device, sllm_pool* pool, sllm_error* error);
SLLM_API int32_t sllm_device_unregister(sllm_device* device, sllm_pool* pool, sllm_error* error);
// Waits for the copies on their way. No buffer of it may be left.
SLLM_API void sllm_device_close(sllm_device* device);

// Device memory of this process: what an engine does.
SLLM_API sllm_buffer* sllm_buffer_create(sllm_device* device, uint64_t size_bytes, sllm_error* error);
// The handle by which another process may open it; SLLM_HANDLE_BYTES bytes.
SLLM_API int32_t sllm_buffer_export(sllm_buffer* buffer, uint8_t* handle, sllm_error* error);
// Device memory of another process: what a node does. It ends when its owner does; closing it frees nothing.
SLLM_API sllm_buffer* sllm_buffer_open(sllm_device* device, const uint8_t* handle, uint64_t size_bytes,
                                       sllm_error* error);
SLLM_API uint64_t sllm_buffer_address(const sllm_buffer* buffer);
// Reads device memory back, waiting for it: for checks, not for speed.
SLLM_API int32_t sllm_buffer_read(sllm_buffer* buffer, uint64_t offset, uint64_t length, void* target,
                                  sllm_error* error);
SLLM_API void sllm_buffer_destroy(sllm_buffer* buffer);

// ---- Reader: a few threads that read whole files into chunks of one pool, and send them on to devices. ----

typedef struct sllm_reader sllm_reader;

typedef struct sllm_file {
  const char* path;
  uint64_t size_bytes;
  int64_t mtime_ns;
  uint64_t inode;
  const uint64_t* chunks;  // ceil(size_bytes / chunk_bytes) chunk indexes, in file order; none with a window.
  uint64_t chunk_count;
  const uint8_t* digests;  // XXH3-128, canonical (16 bytes each), of every digest_bytes of the file; NULL: unchecked.
  uint64_t digest_count;   // ceil(size_bytes / digest_bytes), or 0.
  sllm_buffer* target;     // Where the file goes when it is in the pool; NULL: nowhere.
  uint64_t target_offset;  // Where in the target the file begins.
} sllm_file;

typedef struct sllm_load_options {
  int32_t priority;       // Chunks of the highest priority are read first; equal ones take turns.
  int32_t resident;       // 1: the chunks hold the files already; nothing is read, only digests and copies are done.
  uint64_t digest_bytes;  // Divides the pool's chunk_bytes; 0 where no file has digests.
  // Where a model is larger than the pool: every file has a target and no chunks of its own, and its bytes go through
  // these chunks. NULL: each file has its chunks.
  const uint64_t* window;
  uint64_t window_count;
} sllm_load_options;

typedef struct sllm_load_status {
  int32_t state;          // sllm_state; past SLLM_LOADING nothing touches the load's chunks or targets any more.
  int32_t failed_file;    // Index of the file that `error` is about.
  uint64_t cached_bytes;  // Taken from the page cache.
  uint64_t device_bytes;  // Asked of the storage device.
  uint64_t copied_bytes;  // Arrived in the targets.
  uint64_t total_bytes;   // Size of all files.
  double elapsed_s;       // From submit until now, or until the end.
  sllm_error error;
} sllm_load_status;

// What has gone each way, and the time during which at least one chunk was on it.
typedef struct sllm_path_facts {
  uint64_t bytes;
  double busy_s;
} sllm_path_facts;

typedef struct sllm_reader_facts {
  sllm_path_facts cached;   // Page cache to pool.
  sllm_path_facts storage;  // Storage device to pool.
  sllm_path_facts copied;   // Pool to devices.
  int32_t io_uring;         // 1 where direct reads go through io_uring.
} sllm_reader_facts;

// With `io_uring`, direct reads go through it, the pool registered with it, where both are allowed; else pread.
SLLM_API sllm_reader* sllm_reader_create(sllm_pool* pool, uint32_t threads, uint32_t max_loads, int32_t io_uring,
                                         sllm_error* error);
// An eventfd (non-blocking) that becomes readable whenever a load has advanced or ended.
SLLM_API int32_t sllm_reader_event_fd(const sllm_reader* reader);
// Queues a load; never waits for the disk. The caller keeps the chunks unused by others until the load has ended.
SLLM_API int32_t sllm_reader_submit(sllm_reader* reader, const sllm_file* files, uint64_t file_count,
                                    const sllm_load_options* options, uint64_t* load_id, sllm_error* error);
SLLM_API int32_t sllm_reader_status(sllm_reader* reader, uint64_t load_id, sllm_load_status* status, sllm_error* error);
SLLM_API int32_t sllm_reader_set_priority(sllm_reader* reader, uint64_t load_id, int32_t priority, sllm_error* error);
// Goes on without the targets: what is not on its way to them already never goes there, and they may be destroyed.
SLLM_API int32_t sllm_reader_drop_targets(sllm_reader* reader, uint64_t load_id, sllm_error* error);
// Stops a load before its next chunk; it ends as SLLM_CANCELLED once the chunks on their way have arrived.
SLLM_API int32_t sllm_reader_cancel(sllm_reader* reader, uint64_t load_id, sllm_error* error);
// Forgets a load that has ended.
SLLM_API int32_t sllm_reader_forget(sllm_reader* reader, uint64_t load_id, sllm_error* error);
SLLM_API void sllm_reader_get_facts(sllm_reader* reader, sllm_reader_facts* facts);
// Waits for the chunks on their way, then joins the threads.
SLLM_API void sllm_reader_destroy(sllm_reader* reader);

// ---- Mapping: what an engine process does with the fd of a pool that lives elsewhere. ----

// Maps chunks one after another at one fresh address: private, writable, copy-on-write. The fd may be closed after.
// `populate` maps every page now, by so many threads; 0: each at its first touch. SLLM_NO_MEMORY: a page can't be had.
SLLM_API int32_t sllm_map_chunks(int32_t fd, uint64_t chunk_bytes, const uint64_t* chunks, uint64_t chunk_count,
                                 uint32_t populate, void** address, sllm_error* error);
// Maps a whole file in the same way, after checking that it is the described one. With `populate`, SLLM_READ_FAILED
// where a page can't be read; without, its first touch ends the process.
SLLM_API int32_t sllm_map_file(const char* path, uint64_t size_bytes, int64_t mtime_ns, uint64_t inode,
                               uint32_t populate, void** address, sllm_error* error);
// About how many bytes of a file the page cache holds; SLLM_INVALID where the kernel does not tell.
SLLM_API int32_t sllm_cached_bytes(const char* path, uint64_t* cached_bytes, sllm_error* error);
SLLM_API int32_t sllm_unmap(void* address, uint64_t length_bytes, sllm_error* error);

#ifdef __cplusplus
}
#endif

#endif  // SLLM_NATIVE_H
