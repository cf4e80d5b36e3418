// What the parts of the emulated CUDA runtime share.
//
// Nothing is computed here: tests/emulated_gpu/kernels.py does that, on the CPU, in the same memory
// and at once. What is late, as on a real device, is what copies do to the host's memory.
#pragma once
#include <cuda_runtime_api.h>
#include <pthread.h>

#define MOST_DEVICES 8
#define MOST_STREAMS 512  // of all devices; the first ones are the devices' default streams
#define PUBLIC __attribute__((visibility("default")))

extern pthread_mutex_t lock;  // held wherever what follows is touched
extern __thread int current;  // the device of this thread

// Counted for the tests, which read these by name.
extern PUBLIC long emulated_waits;         // of the host for a stream or for the device
extern PUBLIC long emulated_event_waits;   // of the host for an event
extern PUBLIC long emulated_pageable;      // asynchronous copies that are none: of pageable memory
extern PUBLIC long emulated_races;         // pinned memory that was changed before it was read
extern PUBLIC long emulated_uncomputed;    // kernels that were started and that nothing computes
extern PUBLIC long emulated_pinned_bytes;  // in use

int number_of(cudaStream_t stream);
void begin_late(int stream, int to_host, void *host, const void *data, size_t size);
void wait_for_stream(int stream);
void wait_for_all(void);
cudaError_t failed(cudaError_t error);
