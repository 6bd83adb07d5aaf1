/* What this build is: its name from version control, compiler and features. */
#ifndef LLMC_BASE_VERSION_H
#define LLMC_BASE_VERSION_H
#include <stdio.h>
#ifdef __cplusplus
extern "C" {
#endif
const char *llmc_build_id(void);
void version_print(FILE *out);
#ifdef __cplusplus
}
#endif
#endif
