// The host's side of every kernel: the launch and its attributes, clusters that run at once, the driver's tensor maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace vllm_sparse {

// What an error says, or nullptr.
inline const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

struct Launch {
    const void* kernel;
    int blocks, threads;
    int shared_bytes = 0;  // dynamic
    int cluster = 0;       // blocks; 0: no clusters
    bool overlap = false;  // programmatic dependent launch: begins under the tail of the stream's previous kernel
    cudaStream_t stream = nullptr;
};

// A launch as the runtime wants it, which points into itself.
class LaunchConfig {
 public:
    explicit LaunchConfig(const Launch& how) {
        config_.gridDim = dim3(how.blocks);
        config_.blockDim = dim3(how.threads);
        config_.dynamicSmemBytes = how.shared_bytes;
        config_.stream = how.stream;
        config_.attrs = attributes_;
        if (how.overlap) {
            attributes_[config_.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes_[config_.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (how.cluster > 0) {
            attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes_[config_.numAttrs++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
        }
    }
    LaunchConfig(const LaunchConfig&) = delete;
    LaunchConfig& operator=(const LaunchConfig&) = delete;

    const cudaLaunchConfig_t* get() const { return &config_; }

 private:
    cudaLaunchAttribute attributes_[2];
    cudaLaunchConfig_t config_{};
};

// More dynamic shared memory than the 48 KiB that a kernel may have without asking.
inline const char* allow_shared(const void* kernel, int bytes) {
    return text(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

inline const char* launch(const Launch& how, void** arguments) {
    return text(cudaLaunchKernelExC(LaunchConfig(how).get(), how.kernel, arguments));
}

// How many clusters of such a launch the current device runs at once.
inline const char* count_clusters(const Launch& how, int* clusters) {
    return text(cudaOccupancyMaxActiveClusters(clusters, how.kernel, LaunchConfig(how).get()));
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's cuTensorMapEncodeTiled, found at run time so that the library needs no libcuda to link; or nullptr.
inline EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        const auto error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                             : nullptr;
    }();
    return function;
}

}  // namespace vllm_sparse
