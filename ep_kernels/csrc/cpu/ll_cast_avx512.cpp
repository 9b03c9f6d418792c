#include "cpu/ll_cast_loops.h"

namespace ep::cpu::avx512 {
const Fp8Kernels kFp8Kernels{cast_row, accumulate_row, round_row};
}
