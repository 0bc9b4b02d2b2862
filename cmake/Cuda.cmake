# Sets NORMKIT_HAS_CUDA, and enables the language, as NORMKIT_CUDA asks.
if(NORMKIT_HIP)
  message(FATAL_ERROR "NORMKIT_HIP: the kernels compile for gfx90a and newer (make hip), but nothing launches them yet. "
                      "On ROCm the Triton backend runs, which needs no build.")
endif()
set(NORMKIT_HAS_CUDA ON)
if(NORMKIT_CUDA STREQUAL "OFF" OR (WIN32 AND NORMKIT_CUDA STREQUAL "AUTO"))
  set(NORMKIT_HAS_CUDA OFF)
elseif(WIN32 AND NORMKIT_CUDA MATCHES "^(ON|pypi)$")
  message(FATAL_ERROR "NORMKIT_CUDA=${NORMKIT_CUDA}: the CUDA kernels are not built on Windows yet, expected OFF or AUTO.")
elseif(NORMKIT_CUDA STREQUAL "pypi")
  # nvcc from the cuda-toolkit wheels of the build environment, see pyproject.toml.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u, os; print(next(p for b in u.find_spec('nvidia').submodule_search_locations for p in (os.path.join(b, 'cu13'),) if os.path.isdir(p)))"
    OUTPUT_VARIABLE _toolkit OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  file(TO_CMAKE_PATH "${_toolkit}" _toolkit)
  set(CMAKE_CUDA_COMPILER "${_toolkit}/bin/nvcc${CMAKE_EXECUTABLE_SUFFIX}" CACHE FILEPATH "" FORCE)
elseif(NORMKIT_CUDA STREQUAL "ON")
  include(${CMAKE_CURRENT_LIST_DIR}/CudaCompiler.cmake)
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    message(FATAL_ERROR "NORMKIT_CUDA=ON: expected nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or "
                        "/usr/local/cuda, got none. NORMKIT_CUDA=pypi brings one, without a toolkit.")
  endif()
elseif(NORMKIT_CUDA STREQUAL "AUTO")
  include(${CMAKE_CURRENT_LIST_DIR}/CudaCompiler.cmake)
  if(NOT CMAKE_CUDA_COMPILER AND NOT "$ENV{CUDACXX}" STREQUAL "")
    unset(CMAKE_CUDA_COMPILER CACHE) # where an earlier one did not work
    include(CheckLanguage)
    check_language(CUDA)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(NORMKIT_HAS_CUDA OFF)
    message(WARNING "No CUDA compiler that works: normkit is built without CUDA. NORMKIT_CUDA=pypi brings "
                    "one; NORMKIT_CUDA=ON says what is wrong with nvcc here ('$ENV{CUDACXX}').")
  endif()
else()
  message(FATAL_ERROR "NORMKIT_CUDA: expected AUTO, ON, OFF or pypi, got \"${NORMKIT_CUDA}\"")
endif()

if(NORMKIT_HAS_CUDA)
  include(${CMAKE_CURRENT_LIST_DIR}/CudaArchitectures.cmake)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_STANDARD 17)
  enable_language(CUDA)
endif()
