# The CUDA kernels: a static library without Python, and below it a thin binding, so that another Python version
# rebuilds the binding alone.
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
find_package(CUDAToolkit REQUIRED)

# Kernels for one architecture's own instructions, and kernels for every GPU since Ampere.
set(HOPPER_SOURCES
    csrc/cuda/hopper_linear.cu csrc/cuda/hopper_fp8.cu csrc/cuda/hopper_int8.cu csrc/cuda/hopper_bf16.cu
    csrc/cuda/hopper_fp16.cu csrc/cuda/norm.cu csrc/cuda/quantize.cu csrc/cuda/w4a16_stream.cu
    csrc/cuda/w4a16_wgmma.cu)
set(PORTABLE_SOURCES csrc/cuda/mma_linear.cu csrc/cuda/w4a16_linear.cu csrc/cuda/w4a16_mma.cu)

# A fifth of the size (docs/kernels-mma.md). CUDA 13 needs a driver that can unpack it; one for an older toolkit may not.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    add_compile_options($<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
endif()

add_library(vllm_sparse_cuda STATIC)
foreach(family HOPPER PORTABLE)
    if(${family}_SOURCES)
        add_library(cuda_${family} OBJECT ${${family}_SOURCES})
        target_compile_options(cuda_${family} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-O3 -DNDEBUG -Xcompiler=-fPIC>)
        target_sources(vllm_sparse_cuda PRIVATE $<TARGET_OBJECTS:cuda_${family}>)
    endif()
endforeach()
if(TARGET cuda_HOPPER)
    set_target_properties(cuda_HOPPER PROPERTIES CUDA_ARCHITECTURES "90a-real")
endif()
if(TARGET cuda_PORTABLE)
    set_target_properties(cuda_PORTABLE PROPERTIES CUDA_ARCHITECTURES "80-real;89-real;90-real;100-real;120")
endif()
set_target_properties(vllm_sparse_cuda PROPERTIES LINKER_LANGUAGE CUDA CUDA_ARCHITECTURES "90a-real")

pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/bindings_cuda.cpp)
target_link_libraries(_cuda PRIVATE vllm_sparse_cuda)
target_include_directories(_cuda PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
set_target_properties(_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${VLLM_SPARSE_OUTPUT}" CUDA_ARCHITECTURES "90a-real")
