// SPDX-License-Identifier: Apache-2.0
// The wheel's programs run with glibc 2.28 and newer (PEP 600). These are the names that the programs need and that
// glibc has had only since: linked into the wheel's programs, and into no others.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <string.h>

#pragma GCC visibility push(hidden)

// Since glibc 2.32. libstdc++ asks it before it uses an atomic instruction; 0, "there may be threads", is always right.
char __libc_single_threaded = 0;

// Since glibc 2.33. The older mallinfo counts in ints, so a heap of 2 GiB and more shows too little.
struct mallinfo2 mallinfo2(void) {
    struct mallinfo2 (*newer)(void) = (struct mallinfo2(*)(void))dlsym(RTLD_NEXT, "mallinfo2");
    if (newer) return newer();
    struct mallinfo2 result;
    memset(&result, 0, sizeof result);
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    struct mallinfo older = mallinfo();
    result.fordblks = (unsigned int)older.fordblks;
    result.uordblks = (unsigned int)older.uordblks;
    result.hblkhd = (unsigned int)older.hblkhd;
    return result;
}

#pragma GCC visibility pop
