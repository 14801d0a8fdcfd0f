// Python's view of csrc/cpu: raw pointers and sizes in, nothing out. Shapes are checked in vllm_sparse/kernels/cpu.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/calibrate.h"
#include "cpu/linear.h"

namespace py = pybind11;
namespace cpu = vllm_sparse::cpu;

namespace {

using Pointer = std::uintptr_t;

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

std::vector<std::string> tiers() {
    std::vector<std::string> names;
    for (const cpu::Tier* tier : cpu::available_tiers()) names.emplace_back(tier->name);
    return names;
}

void pack(cpu::Format format, std::int64_t n, std::int64_t k, Pointer values, Pointer positions, Pointer panels,
          Pointer sums) {
    py::gil_scoped_release release;
    cpu::pack(format, n, k, at<const void>(values), at<const std::uint8_t>(positions), at<std::uint8_t>(panels),
              at<std::int32_t>(sums));
}

void linear(const cpu::Tier& tier, cpu::Format format, std::int64_t n, std::int64_t k, std::int64_t group_size,
            Pointer panels, Pointer group_scales, cpu::Dtype group_scale_dtype, Pointer channel_scales, Pointer sums,
            Pointer x, cpu::Dtype dtype, std::int64_t m, std::int64_t stride, Pointer input_scale, Pointer input_zero,
            bool symmetric_input, Pointer y, Pointer bias) {
    cpu::Quantize quantize = cpu::Quantize::none;
    if (cpu::takes_int8(format)) quantize = symmetric_input ? cpu::Quantize::int8 : cpu::Quantize::int8_zero_point;
    if (format == cpu::Format::fp8) quantize = cpu::Quantize::fp8;
    const cpu::Weight weight{format,
                             n,
                             k,
                             group_size,
                             at<const std::uint8_t>(panels),
                             at<const void>(group_scales),
                             group_scale_dtype,
                             at<const float>(channel_scales),
                             at<const void>(sums)};
    const cpu::Input input{at<const void>(x),
                           dtype,
                           m,
                           stride,
                           quantize,
                           at<const float>(input_scale),
                           at<const std::int32_t>(input_zero)};
    const cpu::Output output{at<void>(y), dtype, at<const void>(bias)};
    py::gil_scoped_release release;
    cpu::linear(tier, weight, input, output);
}

void gram(const cpu::Tier& tier, Pointer x, std::int64_t m, std::int64_t k, std::int64_t stride, Pointer sum) {
    py::gil_scoped_release release;
    cpu::gram(tier, at<const std::uint16_t>(x), m, k, stride, at<float>(sum));
}

void columns(const cpu::Tier& tier, cpu::Columns::Kind kind, std::int64_t count, std::int64_t n, std::int64_t ld,
             Pointer weight, Pointer gradient, Pointer keep, Pointer scales, Pointer square, Pointer errors,
             float max_code, bool fp8) {
    const cpu::Columns loop{kind,
                            count,
                            ld,
                            at<float>(weight),
                            at<const float>(gradient),
                            at<std::uint8_t>(keep),
                            at<const float>(scales),
                            at<const float>(square),
                            at<float>(errors),
                            max_code,
                            fp8};
    py::gil_scoped_release release;
    cpu::columns(tier, loop, n);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "2:4 linear layers on the CPU";
    py::enum_<cpu::Format>(module, "Format")
        .value("bf16", cpu::Format::bf16)
        .value("fp16", cpu::Format::fp16)
        .value("fp8", cpu::Format::fp8)
        .value("w8a16", cpu::Format::w8a16)
        .value("w4a16", cpu::Format::w4a16)
        .value("int8", cpu::Format::int8)
        .value("w4a8", cpu::Format::w4a8);
    py::enum_<cpu::Dtype>(module, "Dtype")
        .value("f32", cpu::Dtype::f32)
        .value("bf16", cpu::Dtype::bf16)
        .value("fp16", cpu::Dtype::fp16);
    py::enum_<cpu::Columns::Kind>(module, "Kind")
        .value("sparsegpt", cpu::Columns::Kind::sparsegpt)
        .value("gptq", cpu::Columns::Kind::gptq)
        .value("descent", cpu::Columns::Kind::descent);
    py::class_<cpu::Tier>(module, "Tier")
        .def_readonly("name", &cpu::Tier::name)
        .def_property_readonly("has_gram", [](const cpu::Tier& tier) { return tier.gram != nullptr; })
        .def_property_readonly("has_columns", [](const cpu::Tier& tier) { return tier.columns != nullptr; });
    module.attr("CHANNELS") = cpu::kChannels;
    module.attr("COLUMNS") = cpu::kColumns;
    module.attr("GRAM_COLUMNS") = cpu::kGramColumns;
    module.def("tiers", tiers, "Names of the instruction-set tiers that this machine runs, best first");
    module.def("find_tier", &cpu::find_tier, py::return_value_policy::reference);
    module.def("panel_bytes", [](cpu::Format format) { return cpu::panel_bytes(format); });
    module.def("pack", pack);
    module.def("linear", linear);
    module.def("gram", gram);
    module.def("columns", columns);
}
