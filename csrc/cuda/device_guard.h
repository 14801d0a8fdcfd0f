// Makes a CUDA device current while the guard lives.
#pragma once

#include <cuda_runtime.h>

namespace vllm_sparse {

class DeviceGuard {
 public:
    explicit DeviceGuard(int device) {
        cudaError_t status = cudaGetDevice(&before_);
        if (status == cudaSuccess && before_ != device) {
            status = cudaSetDevice(device);
            changed_ = status == cudaSuccess;
        }
        error = status == cudaSuccess ? nullptr : cudaGetErrorString(status);
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    const char* error;  // nullptr, or why the device could not be made current

 private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace vllm_sparse
