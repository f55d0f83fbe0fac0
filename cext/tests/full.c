/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What finds no room is tried again once something has been freed, whoever has no room: the file
 * system or an owner's quota; what was stored through a mapping too. */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "../engine.h"
#include "bare.h"
#include "check.h"

enum { SIZE = 2000, LIMIT = 1500 };

static struct server server;
static char out[WIRE_HEADER + WIRE_DATA];
static errint_t refusal; /* what is answered as long as nothing has been freed */
static int calls;

static ssize_t call(void *arg, const struct request *r, char *data, size_t cap)
{
    (void)r, (void)data, (void)cap;
    CHECK(arg == &server);
    if (calls++ > 0)
        return 0;
    freed_begin(&server.freed);
    freed_end(&server.freed);
    return refusal;
}

static int32_t ask(uint32_t opcode, uint64_t nodeid, const void *body, size_t len)
{
    struct fuse_in_header head = {
        .len = (uint32_t)(sizeof head + len), .opcode = opcode, .nodeid = nodeid};
    struct request r = {.head = &head, .body = body, .len = len};

    calls = 0;
    CHECK(serve(&server, &r, out) >= sizeof(struct fuse_out_header));
    return ((struct fuse_out_header *)(void *)out)->error;
}

static void test_by_call(void)
{
    static const char body[FUSE_COMPAT_SETXATTR_IN_SIZE + 7] = {[8] = 'u', '.', 'x'};

    refusal = -EDQUOT;
    CHECK(ask(FUSE_SETXATTR, ROOT_INO, body, sizeof body) == 0 && calls == 2);
    refusal = -ENOSPC;
    CHECK(ask(FUSE_SETXATTR, ROOT_INO, body, sizeof body) == 0 && calls == 2);
    refusal = -EACCES;
    CHECK(ask(FUSE_SETXATTR, ROOT_INO, body, sizeof body) == -EACCES && calls == 1);
}

struct write {
    struct fuse_write_in in;
    char data[SIZE];
};

/* The change of mode that it is preceded by here finds no room at first. */
static void test_stored_pages(uint64_t ino, uint64_t fh)
{
    struct write w = {
        .in = {.fh = fh, .size = SIZE, .write_flags = FUSE_WRITE_CACHE | FUSE_WRITE_KILL_SUIDGID}};

    refusal = -ENOSPC;
    CHECK(ask(FUSE_WRITE, ino, &w, sizeof w) == 0 && calls == 2);
}

/* A write may be short, but nobody would see that pages were. */
static void test_stored_in_part(uint64_t ino, uint64_t fh)
{
    const struct rlimit limit = {.rlim_cur = LIMIT, .rlim_max = RLIM_INFINITY};
    struct write w = {.in = {.fh = fh, .size = SIZE}};
    struct rlimit before;

    CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK(signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(ask(FUSE_WRITE, ino, &w, sizeof w) == 0);
    CHECK(((struct fuse_write_out *)(void *)(out + sizeof(struct fuse_out_header)))->size == LIMIT);
    w.in.write_flags = FUSE_WRITE_CACHE;
    CHECK(ask(FUSE_WRITE, ino, &w, sizeof w) == -EFBIG);
    CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
}

int main(void)
{
    struct tree_options options = BARE;
    char base[] = "unionfs-full-XXXXXX";
    struct layer layer = {0};
    struct stat st;
    uint64_t fh;

    CHECK(mkdtemp(base));
    layer.fd = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fstat(layer.fd, &st) == 0);
    layer.dev = st.st_dev;
    CHECK(close(openat(layer.fd, "file", O_CREAT | O_WRONLY, 0600)) == 0);
    CHECK(fchmodat(layer.fd, "file", 04755, 0) == 0);
    options.has_upper = true;
    CHECK(tree_new(&layer, 1, &options, &server.tree) == 0);
    hold_init(&server.hold);
    server.options = (struct engine_options){
        .device = -1, .statfs_fd = layer.fd, .only_uid = -1, .call = call, .arg = &server};
    CHECK(tree_lookup(server.tree, ROOT_INO, "file", &st) == 0);
    CHECK(file_open(server.tree, st.st_ino, O_RDWR, &fh) == 0);
    test_by_call();
    test_stored_pages(st.st_ino, fh);
    CHECK(fchmodat(layer.fd, "file", 0600, 0) == 0); /* not by a mapping of ours */
    test_stored_in_part(st.st_ino, fh);
    tree_shut(server.tree);
    tree_free(server.tree);
    (void)close(layer.fd);
    return 0;
}
