// Loaded before the package bochscpu-python 0.4.0: its wheel asks for functions of a newer C library than its name
// says, and builds a processor without VNNI where it has one with all that our kernels are written for.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

unsigned long long __isoc23_strtoull(const char *text, char **end, int base) { return strtoull(text, end, base); }

int __isoc23_sscanf(const char *text, const char *format, ...) {
    va_list all;
    va_start(all, format);
    const int found = vsscanf(text, format, all);
    va_end(all);
    return found;
}

// In the place of the processor that it builds (Cannon Lake) another of its own (Sapphire Rapids).
void *_Z23create_corei3_cnl_cpuidP8BX_CPU_C(void *cpu) {
    Dl_info caller;
    if (!dladdr(__builtin_return_address(0), &caller)) abort();
    void *library = dlopen(caller.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    void *create = library ? dlsym(library, "_Z28create_sapphire_rapids_cpuidP8BX_CPU_C") : NULL;
    if (!create) abort();
    return ((void *(*)(void *))create)(cpu);
}
