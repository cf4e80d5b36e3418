// The devices, their properties, and errors.
#include "runtime.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
__thread int current;
static __thread cudaError_t last_error;

cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

PUBLIC cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
PUBLIC cudaError_t cudaPeekAtLastError(void) { return last_error; }
PUBLIC const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
  }
}
PUBLIC const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported by the emulated GPU";
    default: return "unknown error of the emulated GPU";
  }
}

static int count_all(void) {
  const char *text = getenv("EMULATED_GPUS");
  int count = text ? atoi(text) : 1;
  return count < 0 ? 0 : count > MOST_DEVICES ? MOST_DEVICES : count;
}
// CUDA_VISIBLE_DEVICES, as numbers: which of all devices have the numbers from 0 on here.
static int visible(int *numbers) {
  const char *text = getenv("CUDA_VISIBLE_DEVICES");
  int count = 0, all = count_all();
  if (!text)
    for (; count < all; count++) numbers[count] = count;
  else
    for (char *end; count < all; text = *end == ',' ? end + 1 : end) {
      long number = strtol(text, &end, 10);
      if (end == text || number < 0 || number >= all) break;
      numbers[count++] = number;
    }
  return count;
}
static int count_devices(void) {
  int numbers[MOST_DEVICES];
  return visible(numbers);
}
PUBLIC cudaError_t cudaGetDeviceCount(int *count) {
  *count = count_devices();
  return cudaSuccess;
}
PUBLIC cudaError_t cudaGetDevice(int *device) {
  *device = current;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= count_devices()) return failed(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
// Those of an H100, as far as torch reads them.
PUBLIC cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  size_t free_bytes;
  int numbers[MOST_DEVICES];
  if (device >= visible(numbers)) return failed(cudaErrorInvalidDevice);
  memset(found, 0, sizeof *found);
  strcpy(found->name, "Emulated GPU");
  memset(&found->uuid, 0x11 + numbers[device], sizeof found->uuid);
  cudaMemGetInfo(&free_bytes, &found->totalGlobalMem);
  found->major = 9;
  found->multiProcessorCount = 132;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  for (int axis = 0; axis < 3; axis++) {
    found->maxThreadsDim[axis] = 1024;
    found->maxGridSize[axis] = 65535;
  }
  found->regsPerBlock = 65536;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->l2CacheSize = 50 << 20;
  found->memoryBusWidth = 5120;
  found->unifiedAddressing = 1;
  found->pciBusID = numbers[device];
  return cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
  snprintf(text, size, "0000:%02x:00.0", device);
  return cudaSuccess;
}
PUBLIC cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = 0;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
PUBLIC cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
PUBLIC cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// Kernels. Those that torch's dispatcher knows are computed by kernels.py and never come here; one
// that does come would leave garbage, and is refused.
long emulated_uncomputed;

static cudaError_t refuse(void) {
  __atomic_add_fetch(&emulated_uncomputed, 1, __ATOMIC_RELAXED);
  return failed(cudaErrorNotSupported);
}
PUBLIC cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream) {
  return refuse();
}
PUBLIC cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **arguments,
                                      size_t shared, cudaStream_t stream) {
  return refuse();
}
PUBLIC cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f,
                                       void **arguments) {
  return refuse();
}

// The driver's functions are looked up by name; torch calls one of them to see whether a device is
// in use already.
static int context_state(int device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
static int not_supported(void) { return 801; }
PUBLIC cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                    unsigned version, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *found) {
  *function = strstr(name, "PrimaryCtxGetState") ? (void *)context_state : (void *)not_supported;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
