/* Models from elsewhere and to elsewhere: Hugging Face directories, single and split safetensors files, llm.c weights; P28 bit for bit.
 * Files are made here, except the golden one that Hugging Face's own code wrote. */
#include "../../llmc/base/rng.h"
#include "../../llmc/run/checkpoint_private.h"
#include "test.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[256];
static Backend *cpu;

static GPT2 model_create(GPT2Config c) {
    GPT2 model;
    Error e = {0};
    if (!gpt2_config_check(&c, &e) || !gpt2_create(&model, cpu, &c, false, &e)) exit(error_print(&e));
    return model;
}

static GPT2 tiny(void) { return model_create((GPT2Config){.V = 50, .L = 2, .H = 2, .C = 16, .T = 8}); }

/* Every value another one, and exact in bfloat16 and binary16, so that each dtype must come back bit for bit. */
static float value_at(uint64_t seed, size_t tensor, size_t i) {
    Rng4 r = rng4(seed, (uint32_t)tensor, 0, i);
    return (float)((int)(r.v[0] % 255) - 127) * 0x1p-9f;
}

static void model_fill(GPT2 *model, uint64_t seed) {
    for (size_t i = 0; i < model->layout.n_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        size_t n = t->file_rows * t->cols;
        float *values = xmalloc(n * sizeof *values);
        for (size_t k = 0; k < n; k++) values[k] = value_at(seed, i, k);
        gpt2_tensor_set(model, t, PARAM_MASTER, values);
        free(values);
    }
    gpt2_params_changed(model);
}

static size_t differences(const GPT2 *model, uint64_t seed) {
    size_t count = 0;
    for (size_t i = 0; i < model->layout.n_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        size_t n = t->file_rows * t->cols;
        float *values = xmalloc(n * sizeof *values);
        gpt2_tensor_get(model, t, PARAM_MASTER, values);
        for (size_t k = 0; k < n; k++) count += values[k] != value_at(seed, i, k);
        free(values);
    }
    return count;
}

/* ---- making files ---- */

typedef struct {
    const char *prefix;       /* before every name */
    StDtype dtype;            /* of every tensor */
    const char *drop;         /* a tensor that is left out */
    const char *misshape;     /* one that loses its last row */
    const char *extra;        /* one more, of 3 elements */
    int head;                 /* 0: no lm_head.weight, 1: equal to wte, 2: another */
    bool masks;               /* h.i.attn.bias, h.i.attn.masked_bias */
    int shard;                /* 0: all tensors; 1, 2: the odd, the even ones */
    bool nan;                 /* in ln_f.bias */
} Make;

typedef struct {
    StTensor tensors[64];
    void *data[64];
    size_t n;
} Bag;

static void bag_add(Bag *b, const char *prefix, const char *name, StDtype dtype, int n_dims, const uint64_t *shape, const float *values) {
    static const struct { const char *name; size_t bytes; } types[] = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F64", 8}, {"I64", 8}, {"I32", 4}, {"U8", 1}};
    StTensor *t = &b->tensors[b->n];
    uint64_t elements = 1;
    *t = (StTensor){.name = xasprintf("%s%s", prefix, name), .dtype = dtype, .n_dims = n_dims, .begin = b->n ? t[-1].end : 0};
    snprintf(t->dtype_name, sizeof t->dtype_name, "%s", types[dtype].name);
    for (int i = 0; i < n_dims; i++) elements *= t->shape[i] = shape[i];
    t->end = t->begin + elements * types[dtype].bytes;
    unsigned char *raw = b->data[b->n++] = xcalloc(elements, types[dtype].bytes);
    for (uint64_t i = 0; values && i < elements; i++) {
        uint32_t bits;
        double wide = (double)values[i];
        memcpy(&bits, &values[i], 4);
        uint16_t half = (uint16_t)(bits >> 16 & 0x8000u);
        if (values[i] != 0) half |= (uint16_t)(((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023));
        uint16_t brain = (uint16_t)(bits >> 16);
        const void *from = dtype == ST_F16 ? (void *)&half : dtype == ST_BF16 ? (void *)&brain : dtype == ST_F64 ? (void *)&wide : (void *)&bits;
        memcpy(raw + i * types[dtype].bytes, from, types[dtype].bytes);
    }
}

static void bag_write(Bag *b, const char *path) {
    Error e = {0};
    FileWriter *w = file_create(path, &e);
    EXPECT(w && st_write_header(w, b->tensors, b->n, "{\"format\":\"pt\"}", &e), "%s", e.text);
    for (size_t i = 0; i < b->n; i++) {
        EXPECT(file_write(w, b->data[i], b->tensors[i].end - b->tensors[i].begin, &e), "%s", e.text);
        free(b->data[i]);
        free(b->tensors[i].name);
    }
    EXPECT(file_commit(w, NULL, NULL, &e), "%s", e.text);
}

static void make_weights(const char *path, const GPT2 *model, Make m) {
    Bag b = {.n = 0};
    if (!m.prefix) m.prefix = "";
    for (size_t i = 0; i < model->layout.n_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        StTensor as = file_tensor(t, 0);
        float *values = xmalloc(t->file_rows * t->cols * sizeof *values);
        gpt2_tensor_get(model, t, PARAM_MASTER, values);
        if (m.nan && !strcmp(t->name, "ln_f.bias")) values[3] = NAN;
        if (m.misshape && !strcmp(t->name, m.misshape)) as.shape[0]--;
        bool here = (!m.drop || strcmp(t->name, m.drop) != 0) && (!m.shard || m.shard == 1 + (int)(i % 2));
        if (here) bag_add(&b, m.prefix, t->name, m.dtype, as.n_dims, as.shape, values);
        if (i == 0 && m.head) {
            values[17] += m.head == 2 ? 1 : 0;
            bag_add(&b, "", "lm_head.weight", m.dtype, as.n_dims, as.shape, values);
        }
        free(values);
    }
    if (m.extra) bag_add(&b, "", m.extra, ST_F32, 1, (uint64_t[]){3}, NULL);
    if (m.masks) bag_add(&b, m.prefix, "h.0.attn.bias", ST_U8, 4, (uint64_t[]){1, 1, 8, 8}, NULL);
    if (m.masks) bag_add(&b, m.prefix, "h.0.attn.masked_bias", ST_F32, 0, NULL, NULL);
    bag_write(&b, path);
}

static const char CONFIG[] = "{\"model_type\":\"gpt2\",\"vocab_size\":50,\"n_positions\":8,\"n_embd\":16,\"n_layer\":2,\"n_head\":2}";

static void write_file(const char *dir, const char *name, const char *text) {
    char *path = path_join(dir, name);
    Error e = {0};
    EXPECT(file_replace(path, text, strlen(text), &e), "%s", e.text);
    free(path);
}

/* A fresh directory ROOT/NAME; config NULL: without config.json. */
static char *fresh(const char *name, const char *config) {
    char *dir = path_join(root, name);
    Error e = {0};
    EXPECT(path_remove_tree(dir, &e) && dir_create(dir, &e), "%s", e.text);
    if (config) write_file(dir, "config.json", config);
    return dir;
}

static char *dir_with(Make m) {
    GPT2 model = tiny();
    model_fill(&model, 1);
    char *dir = fresh("model", CONFIG), *path = path_join(dir, "model.safetensors");
    make_weights(path, &model, m);
    gpt2_destroy(&model);
    free(path);
    return dir;
}

/* Imports into a model filled otherwise; true when all values are those of seed 1. */
static bool imports(const char *path, Error *e) {
    GPT2Config c;
    *e = (Error){0};
    if (!import_config(path, &c, e)) return false;
    GPT2 model = model_create(c);
    model_fill(&model, 2);
    bool ok = import_weights(path, &model, e);
    EXPECT(!ok || differences(&model, 1) == 0, "%zu values differ", differences(&model, 1));
    EXPECT(ok || differences(&model, 2) == 0 || strstr(e->text, "finite"), "a refused import touched the model");
    gpt2_destroy(&model);
    return ok;
}

/* ---- tests ---- */

TEST(P28_export_then_import_is_bitwise) {
    GPT2 model = tiny();
    char *dir = path_join(root, "export"), *tokenizer = fresh("tokenizer", NULL), *copy;
    Error e = {0};
    model_fill(&model, 1);
    write_file(tokenizer, "vocab.json", "{\"a\":0}");
    write_file(tokenizer, "merges.txt", "#version: 0.2\n");
    EXPECT(export_model(dir, &model, tokenizer, &e), "%s", e.text);
    EXPECT(imports(dir, &e), "%s", e.text);
    copy = import_tokenizer_dir(dir);
    EXPECT(copy && !strcmp(copy, dir));
    free(copy);
    char *file = path_join(dir, "model.safetensors");
    copy = import_tokenizer_dir(file);
    EXPECT(copy && !strcmp(copy, dir), "%s", copy);
    EXPECT(imports(file, &e), "%s", e.text);
    free(copy), free(file), free(tokenizer), free(dir);
    gpt2_destroy(&model);
}

/* What Hugging Face's own save_pretrained wrote comes in, goes out, and is the same again, tensor by tensor. */
TEST(P28_a_model_that_hugging_face_wrote) {
    static const char golden[] = "dev/test/golden/hf_tiny";
    char *dir = path_join(root, "again"), *a = path_join(golden, "model.safetensors"), *b = path_join(dir, "model.safetensors");
    GPT2Config c;
    Error e = {0};
    StFile before, after;
    EXPECT(import_config(golden, &c, &e), "%s", e.text);
    GPT2 model = model_create(c);
    EXPECT(import_weights(golden, &model, &e) && export_model(dir, &model, NULL, &e), "%s", e.text);
    EXPECT(st_open(&before, a, &e) && st_open(&after, b, &e), "%s", e.text);
    size_t compared = 0;
    for (size_t i = 0; i < after.n; i++) {
        const StTensor *t = &after.tensors[i], *u = st_find(&before, t->name);
        char *prefixed = xasprintf("transformer.%s", t->name);
        if (!u) u = st_find(&before, prefixed);
        free(prefixed);
        EXPECT(u && u->n_dims == t->n_dims && !memcmp(u->shape, t->shape, sizeof t->shape), "%s", t->name);
        if (!u) continue;
        size_t n = (size_t)(t->end - t->begin) / 4;
        float *x = xmalloc(4 * n), *y = xmalloc(4 * n);
        EXPECT(st_read_f32(&before, u, x, &e) && st_read_f32(&after, t, y, &e) && !memcmp(x, y, 4 * n), "%s", t->name);
        free(x), free(y);
        compared++;
    }
    EXPECT(compared == after.n && compared == 4 + 12 * c.L, "%zu tensors", compared);
    st_close(&before), st_close(&after);
    gpt2_destroy(&model);
    free(dir), free(a), free(b);
}

/* Conv1D: the file's (in, out) is the transpose of what the model holds. */
TEST(matrices_are_transposed) {
    char *dir = dir_with((Make){0});
    GPT2 model = tiny();
    Error e = {0};
    EXPECT(import_weights(dir, &model, &e), "%s", e.text);
    for (size_t i = 0; i < model.layout.n_tensors; i++) {
        const ParamTensor *t = &model.layout.tensors[i];
        for (size_t r = 0; r < t->file_rows; r++)
            for (size_t col = 0; col < t->cols; col++) {
                float held = model.master.p[t->offset + r * t->cols + col];
                EXPECT(held == value_at(1, i, t->conv1d ? col * t->rows + r : r * t->cols + col), "%s row %zu column %zu", t->name, r, col);
            }
    }
    gpt2_destroy(&model);
    free(dir);
}

TEST(names_dtypes_masks_and_heads_as_met) {
    static const Make good[] = {{.head = 0},          {.prefix = "transformer."}, {.prefix = "transformer.", .head = 1, .masks = true}, {.masks = true, .head = 1},
                                {.dtype = ST_F16},    {.dtype = ST_BF16, .head = 1}, {.dtype = ST_F64}};
    Error e;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        char *dir = dir_with(good[i]);
        EXPECT(imports(dir, &e), "case %zu: %s", i, e.text);
        free(dir);
    }
}

TEST(wrong_tensors_are_named) {
    static const struct { Make make; const char *expect[3]; } bad[] = {
        {{.drop = "h.1.ln_1.weight"}, {"missing: h.1.ln_1.weight (16)"}},
        {{.drop = "wte.weight", .head = 1}, {"missing: wte.weight (50, 16)"}},
        {{.misshape = "h.0.mlp.c_fc.weight"}, {"h.0.mlp.c_fc.weight: found F32 (15, 64), expected", "(16, 64)"}},
        {{.misshape = "wpe.weight", .prefix = "transformer."}, {"wpe.weight: found F32 (7, 16)", "(8, 16)"}},
        {{.extra = "h.2.ln_1.weight"}, {"surplus: h.2.ln_1.weight (3)"}},
        {{.extra = "transformer.wte.weight"}, {"twice: transformer.wte.weight"}},
        {{.extra = "score.weight", .drop = "ln_f.bias"}, {"surplus: score.weight", "missing: ln_f.bias", "2 differences"}},
        {{.head = 2}, {"lm_head.weight differs from wte.weight (row 1, column 1", "untied heads are not supported"}},
        {{.dtype = ST_I32}, {"wte.weight: found I32 (50, 16), expected F32", "28 differences", "..."}},
        {{.nan = true}, {"tensor ln_f.bias: element 3 is nan"}},
    };
    Error e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *dir = dir_with(bad[i].make);
        EXPECT(!imports(dir, &e) && e.code == EXIT_DATA, "case %zu was accepted", i);
        for (int k = 0; k < 3 && bad[i].expect[k]; k++) EXPECT(strstr(e.text, bad[i].expect[k]), "case %zu: no \"%s\" in: %s", i, bad[i].expect[k], e.text);
        free(dir);
    }
}

TEST(unsupported_settings_are_named) {
    static const struct { const char *field, *bad, *good; } cases[] = {
        {"model_type", "\"gpt_neo\"", "\"gpt2\""},        {"activation_function", "\"relu\"", "\"gelu_pytorch_tanh\""},
        {"activation_function", "\"gelu\"", "\"gelu_new\""}, {"n_inner", "63", "64"},
        {"n_inner", "\"64\"", "null"},                    {"layer_norm_epsilon", "1e-6", "1e-05"},
        {"scale_attn_weights", "false", "true"},          {"scale_attn_by_inverse_layer_idx", "true", "false"},
        {"add_cross_attention", "true", "false"},         {"tie_word_embeddings", "false", "true"},
        {"vocab_size", "0", "50"},                        {"n_head", "\"2\"", "2"},
        {"n_head", "3", "4"},                             {"n_positions", "-8", "8"},
        {"n_layer", "1e9", "2"},
        {"n_embd", "4611686018427387904", "16"},                          {"n_embd", "null", "16"},
    };
    static const char *const base[][2] = {{"vocab_size", "50"}, {"n_positions", "8"}, {"n_embd", "16"}, {"n_layer", "2"}, {"n_head", "2"}};
    GPT2Config c;
    Error e = {0};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int good = 0; good < 2; good++) {
            char *text = xasprintf("{\"%s\":%s", cases[i].field, good ? cases[i].good : cases[i].bad);
            for (int k = 0; k < 5; k++) {
                if (!strcmp(base[k][0], cases[i].field)) continue;
                char *longer = xasprintf("%s,\"%s\":%s", text, base[k][0], base[k][1]);
                free(text);
                text = longer;
            }
            char *whole = xasprintf("%s}", text), *dir = fresh("settings", whole);
            bool ok = import_config(dir, &c, &e);
            EXPECT(ok == good, "case %zu %s: %s", i, good ? "good" : "bad", e.text);
            bool shape = !strcmp(cases[i].bad, "3");  /* 16 channels, 3 heads: the shape check's message */
            EXPECT(ok || (e.code == EXIT_DATA && strstr(e.text, shape ? "heads" : cases[i].field)), "case %zu: %s", i, e.text);
            free(whole), free(text), free(dir);
        }
    char *dir = fresh("settings", "{\"vocab_size\": 50,\n \"n_positions\": 8,}");
    EXPECT(!import_config(dir, &c, &e) && strstr(e.text, "config.json:2:"), "%s", e.text);
    free(dir);
    dir = fresh("settings", "{\"vocab_size\": 50}");
    EXPECT(!import_config(dir, &c, &e) && strstr(e.text, "n_positions is missing"), "%s", e.text);
    free(dir);
}

TEST(another_number_of_heads_is_refused) {
    char *dir = dir_with((Make){0});
    GPT2 model = model_create((GPT2Config){.V = 50, .L = 2, .H = 4, .C = 16, .T = 8});
    Error e = {0};
    EXPECT(!import_weights(dir, &model, &e) && strstr(e.text, "found 2 heads, the model has 4"), "%s", e.text);
    gpt2_destroy(&model);
    free(dir);
}

/* Runs import_config with stderr caught. */
static bool config_saying(const char *path, GPT2Config *c, char said[1000], Error *e) {
    char *log = path_join(root, "stderr");
    fflush(stderr);
    int old = dup(2), fd = open(log, O_RDWR | O_CREAT | O_TRUNC, 0666);
    dup2(fd, 2);
    bool ok = import_config(path, c, e);
    fflush(stderr);
    dup2(old, 2);
    ssize_t n = pread(fd, said, 999, 0);
    said[n < 0 ? 0 : n] = 0;
    close(fd), close(old), free(log);
    return ok;
}

TEST(a_file_without_config_says_what_it_assumes) {
    char *dir = fresh("alone", NULL), *path = path_join(dir, "x.safetensors"), said[1000];
    GPT2 model = model_create((GPT2Config){.V = 11, .L = 3, .H = 2, .C = 128, .T = 5});
    GPT2Config c;
    Error e = {0};
    model_fill(&model, 1);
    for (int prefix = 0; prefix < 2; prefix++) {
        make_weights(path, &model, (Make){.prefix = prefix ? "transformer." : ""});
        EXPECT(config_saying(path, &c, said, &e), "%s", e.text);
        EXPECT(c.V == 11 && c.L == 3 && c.H == 2 && c.C == 128 && c.T == 5, "V %zu L %zu H %zu C %zu T %zu", c.V, c.L, c.H, c.C, c.T);
        EXPECT(strstr(said, "heads of size 64 assumed, so 2 heads"), "%s", said);
    }
    gpt2_destroy(&model);
    model = tiny();
    make_weights(path, &model, (Make){0});
    EXPECT(!config_saying(path, &c, said, &e) && e.code == EXIT_DATA && strstr(e.text, "16 channels") && strstr(e.text, "n_head"), "%s", e.text);
    write_file(dir, "config.json", CONFIG);
    EXPECT(config_saying(path, &c, said, &e) && c.H == 2 && !said[0], "%s %s", e.text, said);
    gpt2_destroy(&model);
    free(path), free(dir);
}

TEST(split_over_several_files) {
    GPT2 model = tiny();
    char *dir = fresh("split", CONFIG);
    Error e;
    json_t *map = json_object();
    model_fill(&model, 1);
    for (int shard = 1; shard < 3; shard++) {
        char *name = xasprintf("model-%05d-of-00002.safetensors", shard), *path = path_join(dir, name);
        make_weights(path, &model, (Make){.shard = shard});
        for (size_t i = 0; i < model.layout.n_tensors; i++)
            if (shard == 1 + (int)(i % 2)) json_object_set_new(map, model.layout.tensors[i].name, json_string(name));
        free(name), free(path);
    }
    json_t *index = json_pack("{s:o}", "weight_map", map);
    char *text = json_dumps(index, 0);
    json_decref(index);
    write_file(dir, "model.safetensors.index.json", text);
    EXPECT(imports(dir, &e), "%s", e.text);
    write_file(dir, "model.safetensors.index.json", "{\"weight_map\":{\"a\":\"../x\"}}");
    EXPECT(!imports(dir, &e) && strstr(e.text, "plain name"), "%s", e.text);
    write_file(dir, "model.safetensors.index.json", "{\"weight_map\":{\"a\":\"model-00001-of-00002.safetensors\",\"b\":\"none\"}}");
    EXPECT(!imports(dir, &e) && strstr(e.text, "none"), "%s", e.text);
    write_file(dir, "model.safetensors.index.json", "{}");
    EXPECT(!imports(dir, &e) && strstr(e.text, "weight_map"), "%s", e.text);
    free(text), free(dir);
    gpt2_destroy(&model);
}

TEST(what_is_not_there_is_said) {
    GPT2Config c;
    Error e = {0};
    GPT2 model = tiny();
    EXPECT(!import_config("/nowhere/at/all", &c, &e) && e.code == EXIT_DATA && strstr(e.text, "does not exist"), "%s", e.text);
    char *dir = fresh("empty", NULL);
    EXPECT(!import_config(dir, &c, &e) && strstr(e.text, "config.json"), "%s", e.text);
    write_file(dir, "config.json", CONFIG);
    EXPECT(!import_weights(dir, &model, &e) && strstr(e.text, "neither model.safetensors nor"), "%s", e.text);
    write_file(dir, "pytorch_model.bin", "PK");
    EXPECT(!import_weights(dir, &model, &e) && strstr(e.text, "save_pretrained"), "%s", e.text);
    EXPECT(!import_tokenizer_dir(dir));
    write_file(dir, "vocab.json", "{}");
    EXPECT(!import_tokenizer_dir(dir));
    write_file(dir, "tokenizer.json", "{}");
    char *found = import_tokenizer_dir(dir);
    EXPECT(found && !strcmp(found, dir));
    free(found), free(dir);
    gpt2_destroy(&model);
}

/* Random damage to config.json, the index and the weights' header: an answer, never a crash. */
TEST(random_damage_never_crashes) {
    GPT2 model = tiny();
    char *dir = dir_with((Make){.prefix = "transformer."}), *files[2] = {path_join(dir, "config.json"), path_join(dir, "model.safetensors")};
    Error e = {0};
    int accepted = 0;
    for (int which = 0; which < 2; which++) {
        size_t n = 0;
        char *good = file_read(files[which], &n, &e), *bad = xmalloc(n);
        size_t reach = which ? 2800 : n;   /* the header */
        for (uint64_t i = 0; i < 600; i++) {
            memcpy(bad, good, n);
            for (uint32_t k = 0; k <= i % 3; k++) {
                Rng4 r = rng4(11, (uint32_t)which, k, i);
                bad[r.v[0] % reach] = r.v[1] % 4 ? "0123456789{}[],:\"-.eFIB"[r.v[2] % 23] : (char)r.v[2];
            }
            FILE *f = fopen(files[which], "wb");
            EXPECT(f && fwrite(bad, 1, n, f) == n && fclose(f) == 0);
            GPT2Config c;
            e = (Error){0};
            bool ok = import_config(dir, &c, &e) && import_weights(dir, &model, &e);
            EXPECT(ok || (e.code == EXIT_DATA && e.text[0]), "file %d case %d: %s", which, (int)i, e.text);
            accepted += ok;
        }
        FILE *f = fopen(files[which], "wb");
        EXPECT(f && fwrite(good, 1, n, f) == n && fclose(f) == 0);
        free(good), free(bad);
    }
    EXPECT(accepted < 600, "%d accepted", accepted);
    gpt2_destroy(&model);
    free(dir), free(files[0]), free(files[1]);
}

/* ---- llm.c weights ---- */

/* Independent of the reader: parameter by parameter, layer by layer, rows out, columns in. */
static void make_bin(const char *path, int version, size_t padded) {
    static const struct { const char *name; int layers; size_t rows, cols; } order[] = {
        {"wte.weight", 1, 50, 16}, {"wpe.weight", 1, 8, 16}, {"h.%d.ln_1.weight", 2, 1, 16}, {"h.%d.ln_1.bias", 2, 1, 16},
        {"h.%d.attn.c_attn.weight", 2, 48, 16}, {"h.%d.attn.c_attn.bias", 2, 1, 48}, {"h.%d.attn.c_proj.weight", 2, 16, 16},
        {"h.%d.attn.c_proj.bias", 2, 1, 16}, {"h.%d.ln_2.weight", 2, 1, 16}, {"h.%d.ln_2.bias", 2, 1, 16}, {"h.%d.mlp.c_fc.weight", 2, 64, 16},
        {"h.%d.mlp.c_fc.bias", 2, 1, 64}, {"h.%d.mlp.c_proj.weight", 2, 16, 64}, {"h.%d.mlp.c_proj.bias", 2, 1, 16}, {"ln_f.weight", 1, 1, 16},
        {"ln_f.bias", 1, 1, 16}};
    int32_t header[256] = {20240326, version, 8, 50, 2, 2, 16, (int32_t)padded};
    FILE *f = fopen(path, "wb");
    GPT2 names = tiny();
    fwrite(header, 4, 256, f);
    for (size_t p = 0; p < sizeof order / sizeof *order; p++)
        for (int layer = 0; layer < order[p].layers; layer++) {
            char name[64];
            size_t index = 0, rows = p ? order[p].rows : padded;
            snprintf(name, sizeof name, order[p].name, layer);
            while (strcmp(names.layout.tensors[index].name, name) != 0) index++;
            bool matrix = p >= 2 && order[p].rows > 1;  /* stored as (in, out) in Hugging Face files, for which value_at counts */
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < order[p].cols; c++) {
                    float x = r < order[p].rows ? value_at(1, index, matrix ? c * order[p].rows + r : r * order[p].cols + c) : 99;
                    uint32_t bits;
                    memcpy(&bits, &x, 4);
                    uint16_t half = (uint16_t)(bits >> 16);
                    fwrite(version == 3 ? (void *)&x : (void *)&half, version == 3 ? 4 : 2, 1, f);
                }
        }
    fclose(f);
    gpt2_destroy(&names);
}

TEST(llmc_weights_of_both_versions) {
    char *path = path_join(root, "x.bin");
    Error e;
    for (int version = 3; version <= 5; version += 2)
        for (size_t padded = 50; padded <= 128; padded += 39) {
            make_bin(path, version, padded);
            EXPECT(imports(path, &e), "version %d, %zu rows: %s", version, padded, e.text);
            GPT2 model = tiny();
            EXPECT(import_weights(path, &model, &e), "%s", e.text);
            for (size_t i = 50 * 16; i < model.config.Vp * 16; i++) EXPECT(model.master.p[i] == 0, "padded rows must stay zero");
            gpt2_destroy(&model);
        }
    free(path);
}

TEST(damaged_llmc_weights) {
    char *path = path_join(root, "bad.bin");
    Error e;
    struct stat st;
    make_bin(path, 3, 128);
    EXPECT(stat(path, &st) == 0);
    const off_t cuts[] = {4, 100, 1023, 1024, 2000, st.st_size - 1, st.st_size + 1};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        make_bin(path, 3, 128);
        EXPECT(truncate(path, cuts[i]) == 0 && !imports(path, &e) && e.code == EXIT_DATA && strstr(e.text, "cut off"), "cut %ld: %s", (long)cuts[i], e.text);
    }
    static const struct { int field, value; const char *expect; } fields[] = {
        {1, 4, "version 4"}, {2, 0, "field 2 is 0"}, {3, -50, "field 3 is -50"}, {4, INT32_MAX, "field 4 is"}, {5, 3, "heads"}, {6, 32, "cut off"},
        {7, 49, "padded vocabulary 49"}, {4, 3, "cut off"}, {4, 10000, "cut off"}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        make_bin(path, 3, 128);
        int fd = open(path, O_RDWR);
        EXPECT(pwrite(fd, &fields[i].value, 4, 4 * fields[i].field) == 4);
        close(fd);
        EXPECT(!imports(path, &e) && e.code == EXIT_DATA && strstr(e.text, fields[i].expect), "field %d = %d: %s", fields[i].field, fields[i].value, e.text);
    }
    make_bin(path, 3, 128);
    float bad = INFINITY;
    int fd = open(path, O_RDWR);
    EXPECT(pwrite(fd, &bad, 4, st.st_size - 4) == 4 && close(fd) == 0);
    EXPECT(!imports(path, &e) && strstr(e.text, "ln_f.bias: element 15"), "%s", e.text);
    free(path);
}

int main(int argc, char **argv) {
    Error e = {0};
    if (!(cpu = cpu_backend_create(&e))) return error_print(&e);
    test_start(argc, argv);
    snprintf(root, sizeof root, "%s/llmc_import_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(root)) return 1;
    RUN(P28_export_then_import_is_bitwise);
    RUN(P28_a_model_that_hugging_face_wrote);
    RUN(matrices_are_transposed);
    RUN(names_dtypes_masks_and_heads_as_met);
    RUN(wrong_tensors_are_named);
    RUN(unsupported_settings_are_named);
    RUN(another_number_of_heads_is_refused);
    RUN(a_file_without_config_says_what_it_assumes);
    RUN(split_over_several_files);
    RUN(what_is_not_there_is_said);
    RUN(random_damage_never_crashes);
    RUN(llmc_weights_of_both_versions);
    RUN(damaged_llmc_weights);
    path_remove_tree(root, NULL);
    return test_done();
}
