# One source file per instruction set, each compiled for its own and picked at load time.
function(normkit_kernels source)
  target_sources(_C PRIVATE cpp/cpu/${source})
  set(_most -O3)
  if(MSVC)
    set(_most /clang:-O3)
  endif()
  set_source_files_properties(cpp/cpu/${source} PROPERTIES COMPILE_OPTIONS "${_most};${ARGN}")
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # GCC 12 reports variables of its own AVX-512 headers as uninitialized (gcc bug 105593).
  set(_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
              $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized -Wno-maybe-uninitialized>)
  normkit_kernels(kernels_avx512bf16.cpp ${_avx512} -mavx512bf16)
  normkit_kernels(kernels_avx512.cpp ${_avx512})
  normkit_kernels(kernels_avx2.cpp -mavx2 -mfma -mf16c)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  normkit_kernels(kernels_neon.cpp)
endif()
