/* SPDX-License-Identifier: GPL-2.0-or-later */
/* libFuzzer: requests of any kind and form, as they lie in a ring's buffers, about a small tree. An
 * answer must fit, and say of itself what is so.
 *
 * Input: records of one byte each for the opcode, the inode, the bytes of the request's own header
 * and the bytes that follow it; then these bytes. */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>

#include "../../uring.h"
#include "../bare.h"

static int layer_fds[2];
static struct ring_buffers buffers;
static char base[] = "/tmp/unionfs-fuzz-XXXXXX";

errint_t __wrap_read_xattr(const char *path, bool nofollow, const char *attr, char **ret_value,
                           size_t *ret_len);
errint_t __wrap_read_xattr(const char *path, bool nofollow, const char *attr, char **ret_value,
                           size_t *ret_len)
{
    (void)path;
    (void)nofollow;
    (void)attr;
    (void)ret_value;
    (void)ret_len;
    return -ENODATA;
}

static void remove_base(void)
{
    char command[64];

    (void)snprintf(command, sizeof command, "rm -rf %s", base);
    (void)!system(command);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const struct rlimit small = {.rlim_cur = 1 << 20, .rlim_max = 1 << 20};
    int base_fd;

    (void)argc;
    (void)argv;
    (void)signal(SIGXFSZ, SIG_IGN);
    if (!mkdtemp(base) || ring_buffers_new(&buffers) < 0 || setrlimit(RLIMIT_FSIZE, &small) < 0)
        abort();
    base_fd = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "lower" : "upper";

        if (mkdirat(base_fd, name, 0755) < 0)
            abort();
        layer_fds[i] = openat(base_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        (void)close(openat(layer_fds[i], i ? "b" : "a", O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
        (void)mkdirat(layer_fds[i], "d", 0755);
        (void)symlinkat("a", layer_fds[i], "l");
    }
    (void)close(base_fd);
    (void)atexit(remove_base);
    return 0;
}

/* What Python would be asked. */
static ssize_t call(void *arg, const struct request *r, char *out, size_t cap)
{
    size_t n = r->len < cap ? r->len : cap;

    (void)arg;
    memcpy(out, r->body, n);
    return r->head->opcode % 2 ? -ENOENT : (ssize_t)n;
}

static void ask(struct server *s, uint32_t opcode, uint64_t nodeid, const uint8_t *own,
                size_t own_len, const uint8_t *rest, size_t rest_len)
{
    struct fuse_uring_req_header *h = buffers.header;
    struct fuse_in_header head = {.len = (uint32_t)(sizeof head + own_len + rest_len),
                                  .opcode = opcode,
                                  .unique = 4,
                                  .nodeid = nodeid};
    struct fuse_out_header answer;

    memcpy(h->in_out, &head, sizeof head);
    memcpy(h->op_in, own, own_len < sizeof h->op_in ? own_len : sizeof h->op_in);
    memcpy(buffers.payload, rest, rest_len);
    h->ring_ent_in_out =
        (struct fuse_uring_ent_in_out){.commit_id = 4, .payload_sz = (uint32_t)rest_len};
    ring_buffers_serve(s, &buffers);
    memcpy(&answer, h->in_out, sizeof answer);
    if (answer.unique != 4 || answer.len != sizeof answer + h->ring_ent_in_out.payload_sz ||
        h->ring_ent_in_out.payload_sz > WIRE_DATA || answer.error > 0 || answer.error <= -512 ||
        (answer.error && h->ring_ent_in_out.payload_sz))
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tree_options options = BARE;
    struct server s = {.options = {.statfs_fd = layer_fds[0], .only_uid = -1, .call = call}};
    struct layer layers[2] = {{.fd = layer_fds[0]}, {.fd = layer_fds[1]}};
    struct stat st;

    for (int i = 0; i < 2; i++) {
        if (fstat(layers[i].fd, &st) < 0)
            abort();
        layers[i].dev = st.st_dev;
    }
    options.has_upper = true;
    if (tree_new(layers, 2, &options, &s.tree) < 0)
        return 0;
    while (size >= 4) {
        size_t own = data[2], rest = data[3];
        const uint8_t *head = data;

        data += 4;
        size -= 4;
        own = own < size ? own : size;
        rest = rest < size - own ? rest : size - own;
        ask(&s, head[0], head[1], data, own, data + own, rest);
        data += own + rest;
        size -= own + rest;
    }
    tree_free(s.tree);
    return 0;
}
