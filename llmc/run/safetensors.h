/* The safetensors container: u64 little-endian header length, JSON header, raw row-major data. Strict reader: header at most 100 MB, no overlaps, no gaps, no duplicates,
 * offsets inside the file, sizes that match shapes. */
#ifndef LLMC_RUN_SAFETENSORS_H
#define LLMC_RUN_SAFETENSORS_H
#include "../base/error.h"
#include "../base/io.h"
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
typedef enum { ST_F32, ST_F16, ST_BF16, ST_F64, ST_I64, ST_I32, ST_U8, ST_OTHER } StDtype;
typedef struct {
    char *name;
    StDtype dtype;
    char dtype_name[8];
    int n_dims;
    uint64_t shape[8];
    uint64_t begin, end;      /* bytes from the start of the file's data */
} StTensor;
typedef struct {
    char *path;
    int fd;
    uint64_t data_start;      /* offset of the data in the file */
    uint64_t file_bytes;
    StTensor *tensors;
    size_t n;
    char *metadata_json;      /* the __metadata__ object or NULL */
} StFile;
bool st_open(StFile *f, const char *path, Error *e);                   /* EXIT_DATA */
void st_close(StFile *f);
const StTensor *st_find(const StFile *f, const char *name);            /* NULL: not there */
/* All elements as float32 (F32, F16, BF16, F64). */
bool st_read_f32(const StFile *f, const StTensor *t, float *values, Error *e);

/* Writing: declare the tensors (order = file order), then write their data in that order through the FileWriter. */
bool st_write_header(FileWriter *w, const StTensor *tensors, size_t n, const char *metadata_json, Error *e);
#ifdef __cplusplus
}
#endif
#endif
