// SPDX-License-Identifier: Apache-2.0
/// Powers of ten and their logarithms. Glibc's mathematics, and nothing else of it: the system itself is Posix's.
import Glibc

func log10(_ value: Double) -> Double { Glibc.log10(value) }
func powerOfTen(_ exponent: Double) -> Double { Glibc.pow(10, exponent) }
