# Sets ENV{CUDACXX}, where CMake looks first, to the nvcc that AUTO and ON use; left empty if there is none.
if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
  unset(NORMKIT_NVCC CACHE) # another one may have been installed, or removed, since
  find_program(NORMKIT_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH
               PATHS /usr/local /usr/local/cuda PATH_SUFFIXES bin)
  if(NORMKIT_NVCC)
    set(ENV{CUDACXX} "${NORMKIT_NVCC}")
  endif()
endif()
if(NOT "$ENV{CUDACXX}" STREQUAL "")
  message(STATUS "nvcc: $ENV{CUDACXX}")
endif()
