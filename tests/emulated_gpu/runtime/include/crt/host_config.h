// Comes with nvcc, which torch does not bring: for gcc there is nothing to configure.
#pragma once
#define __CUDACC_VER_MAJOR__ 13
