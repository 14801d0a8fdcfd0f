// Python's view of csrc/cuda: raw pointers, sizes and a stream in, nothing out. Shapes are checked in
// vllm_sparse/kernels/cuda_*.py.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "cuda/hopper_linear.h"
#include "cuda/mma_linear.h"
#include "cuda/norm.h"
#include "cuda/quantize.h"
#include "cuda/w4a16.h"

namespace py = pybind11;

namespace {

using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

// Kernels report failures as one sentence.
void check(const char* kernel, const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string(kernel) + ": " + error);
}

void hopper_linear(int element, Pointer x, std::int64_t x_stride, Pointer x_scale, Pointer x_zero,
                   bool x_scale_per_token, Pointer weight, Pointer weight_scale, Pointer weight_sum, Pointer bias,
                   Pointer out, bool half_out, int m, int n, int k, int device, Pointer scratch, int configuration,
                   bool programmatic, Pointer stream) {
    const vllm_sparse::hopper::LinearArguments arguments{static_cast<vllm_sparse::hopper::Element>(element),
                                                         at<const void>(x),
                                                         x_stride,
                                                         at<const float>(x_scale),
                                                         at<const int>(x_zero),
                                                         x_scale_per_token,
                                                         at<const void>(weight),
                                                         at<const float>(weight_scale),
                                                         at<const int>(weight_sum),
                                                         at<const void>(bias),
                                                         at<void>(out),
                                                         half_out,
                                                         m,
                                                         n,
                                                         k,
                                                         device,
                                                         at<void>(scratch)};
    check("hopper_linear", vllm_sparse::hopper::linear(arguments, configuration, programmatic, at<void>(stream)));
}

void fp8_quantize(Pointer x, bool half, bool gated, Pointer codes, Pointer scale, int m, int k, int device,
                  bool overlap, Pointer stream) {
    const vllm_sparse::fp8::QuantizeArguments arguments{
        at<const void>(x), half, gated, at<void>(codes), at<float>(scale), m, k, device, overlap};
    check("fp8_quantize", vllm_sparse::fp8::quantize(arguments, at<void>(stream)));
}

void add_norm(Pointer x, Pointer residual, Pointer weight, Pointer residual_out, Pointer out, Pointer codes,
              Pointer scale, bool half, float epsilon, int m, int k, int device, bool overlap, Pointer stream) {
    const vllm_sparse::norm::AddNormArguments arguments{at<const void>(x),
                                                        at<const void>(residual),
                                                        at<const void>(weight),
                                                        at<void>(residual_out),
                                                        at<void>(out),
                                                        at<void>(codes),
                                                        at<float>(scale),
                                                        half,
                                                        epsilon,
                                                        m,
                                                        k,
                                                        device,
                                                        overlap};
    check("add_norm", vllm_sparse::norm::add_norm(arguments, at<void>(stream)));
}

void w4a16_linear(Pointer x, Pointer weight, Pointer channel_scale, Pointer bias, Pointer y, Pointer workspace, int m,
                  int n, int k, int group_size, bool bf16, int output, int kernel, int slices, int device, int sm_count,
                  int capability, bool overlap, Pointer stream) {
    const vllm_sparse::W4A16Problem problem{at<const void>(x),
                                            at<const void>(weight),
                                            at<const float>(channel_scale),
                                            at<const void>(bias),
                                            at<void>(y),
                                            at<void>(workspace),
                                            m,
                                            n,
                                            k,
                                            group_size,
                                            bf16,
                                            static_cast<vllm_sparse::W4A16Output>(output),
                                            static_cast<vllm_sparse::W4A16Kernel>(kernel),
                                            slices};
    const vllm_sparse::W4A16Device where{device, sm_count, capability, overlap};
    check("w4a16_linear", vllm_sparse::w4a16_linear(problem, where, at<CUstream_st>(stream)));
}

void mma_linear(Pointer x, Pointer x_scale, Pointer x_zero, bool x_scale_per_token, Pointer weight,
                Pointer channel_scale, Pointer weight_sum, Pointer bias, Pointer y, Pointer workspace, int m, int n,
                int k, int group_size, int weight_type, int x_type, int y_type, int tile, int device, int sm_count,
                int capability, bool overlap, Pointer stream) {
    using vllm_sparse::mma::Number;
    const vllm_sparse::mma::LinearProblem problem{at<const void>(x),
                                                  at<const float>(x_scale),
                                                  at<const int>(x_zero),
                                                  x_scale_per_token,
                                                  at<const void>(weight),
                                                  at<const float>(channel_scale),
                                                  at<const int>(weight_sum),
                                                  at<const void>(bias),
                                                  at<void>(y),
                                                  at<void>(workspace),
                                                  m,
                                                  n,
                                                  k,
                                                  group_size,
                                                  static_cast<Number>(weight_type),
                                                  static_cast<Number>(x_type),
                                                  static_cast<Number>(y_type),
                                                  tile};
    const vllm_sparse::mma::LinearDevice where{device, sm_count, capability, overlap};
    check("mma_linear", vllm_sparse::mma::linear(problem, where, at<CUstream_st>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "2:4 linear layers on NVIDIA GPUs";
    using vllm_sparse::hopper::Element;
    const auto element = [](int e) { return static_cast<Element>(e); };
    module.def(
        "hopper_configurations", [=](int e) { return vllm_sparse::hopper::configuration_count(element(e)); },
        py::arg("element"), "Number of tile configurations");
    module.def(
        "hopper_configuration_tokens",
        [=](int e, int index) { return vllm_sparse::hopper::configuration_tokens(element(e), index); },
        py::arg("element"), py::arg("configuration"));
    module.def(
        "hopper_choose_configuration",
        [=](int e, int m, int n, int k, int multiprocessors) {
            return vllm_sparse::hopper::choose_configuration(element(e), m, n, k, multiprocessors);
        },
        py::arg("element"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("multiprocessors"));
    module.def(
        "hopper_scratch_bytes",
        [=](int e, int m, int n, int k, int multiprocessors, int configuration) {
            return vllm_sparse::hopper::scratch_bytes(element(e), m, n, k, multiprocessors, configuration);
        },
        py::arg("element"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("multiprocessors"),
        py::arg("configuration") = -1);
    module.def("hopper_linear", hopper_linear);
    module.def("fp8_quantize", fp8_quantize);
    module.def("add_norm", add_norm);
    module.def("w4a16_workspace_bytes", &vllm_sparse::w4a16_workspace_bytes, py::arg("sm_count"));
    module.def("w4a16_linear", w4a16_linear);
    module.def("mma_workspace_bytes", &vllm_sparse::mma::workspace_bytes, py::arg("sm_count"));
    module.def("mma_linear", mma_linear);
}
