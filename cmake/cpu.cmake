# The sources of csrc/cpu with one instruction set per file and nothing else from the outside in it, so that no inline
# function compiled for a newer machine can be the copy that the linker keeps.
function(vllm_sparse_add_cpu_sources target directory)
    foreach(name calibrate dispatch linear pack scalar)
        target_sources(${target} PRIVATE ${directory}/${name}.cpp)
    endforeach()
    set(avx2 -mavx2 -mfma -mf16c -fno-lto)
    # gcc's AVX-512 intrinsics start from deliberately undefined registers, which its own warning then finds.
    set(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c -mprefer-vector-width=512 -fno-lto
               $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
    set(avx512_columns ${avx512})
    set(avx512_bf16 ${avx512} -mavx512bf16)
    set(avx512_bf16_gram ${avx512_bf16})
    set(neon -march=armv8.2-a+dotprod -fno-lto)
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
        set(tiers avx2 avx512 avx512_columns avx512_bf16 avx512_bf16_gram)
    elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
        set(tiers neon)
    endif()
    foreach(name ${tiers})
        target_sources(${target} PRIVATE ${directory}/${name}.cpp)
        set_source_files_properties(${directory}/${name}.cpp PROPERTIES COMPILE_OPTIONS "${${name}}")
    endforeach()
endfunction()
