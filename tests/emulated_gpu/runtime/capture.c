// No stream is captured. Its parameters after the second differ between releases of CUDA, so this
// is written without the headers.
#define NOTHING_CAPTURED(name)                  \
  int name(void *stream, int *status) {         \
    *status = 0;                                \
    return 0;                                   \
  }
NOTHING_CAPTURED(cudaStreamGetCaptureInfo)
NOTHING_CAPTURED(cudaStreamGetCaptureInfo_v2)
NOTHING_CAPTURED(cudaStreamGetCaptureInfo_v3)
