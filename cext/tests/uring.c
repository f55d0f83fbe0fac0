/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Requests as they lie in a ring's buffers, their headers apart from what follows: answered as they
 * are when they come by the device, refused when they are malformed; and io_uring itself, where it
 * may be used. Run under ASan, UBSan and TSan. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

#include "../uring.h"
#include "bare.h"
#include "check.h"

static struct server server;
static struct ring_buffers buffers;
static uint64_t killed; /* SETATTR requests that came */

/* Answers with 512 bytes of 'a', which must not reach the data of a write; or with what it got. */
static ssize_t call(void *arg, const struct request *r, char *out, size_t cap)
{
    CHECK(arg == &server);
    if (r->head->opcode == FUSE_SETATTR) {
        killed++;
        memset(out, 'a', 512);
        return 512;
    }
    CHECK(r->len <= cap);
    memcpy(out, r->body, r->len);
    return (ssize_t)r->len;
}

/* Puts a request into the buffers, `own` bytes of it apart, and has it answered. */
static struct fuse_out_header ask(uint32_t opcode, uint64_t nodeid, const void *body, size_t own,
                                  size_t len)
{
    struct fuse_in_header head = {
        .len = (uint32_t)(sizeof head + len), .opcode = opcode, .unique = 12, .nodeid = nodeid};
    struct fuse_out_header answer;

    memcpy(buffers.header->in_out, &head, sizeof head);
    memcpy(buffers.header->op_in, body, own);
    memcpy(buffers.payload, (const char *)body + own, len - own);
    buffers.header->ring_ent_in_out = (struct fuse_uring_ent_in_out){
        .commit_id = head.unique, .payload_sz = (uint32_t)(len - own)};
    ring_buffers_serve(&server, &buffers);
    memcpy(&answer, buffers.header->in_out, sizeof answer);
    CHECK(answer.unique == 12 && buffers.header->ring_ent_in_out.commit_id == 12);
    CHECK(answer.len == sizeof answer + buffers.header->ring_ent_in_out.payload_sz);
    return answer;
}

static struct fuse_entry_out look_up(const char *name)
{
    struct fuse_entry_out entry;

    CHECK(ask(FUSE_LOOKUP, ROOT_INO, name, 0, strlen(name) + 1).error == 0);
    memcpy(&entry, buffers.payload, sizeof entry);
    return entry;
}

static void test_names(void)
{
    struct fuse_entry_out entry = look_up("file");
    struct fuse_attr_out attr;
    struct {
        struct fuse_mkdir_in in;
        char name[8];
    } wanted = {.in = {.mode = 0755}, .name = "new"};

    CHECK(entry.nodeid && entry.attr.size == 5 && (entry.attr.mode & S_IFMT) == S_IFREG);
    CHECK(look_up("none").nodeid == 0);
    CHECK(ask(FUSE_GETATTR, entry.nodeid, "", 0, 0).error == 0);
    memcpy(&attr, buffers.payload, sizeof attr);
    CHECK(attr.attr.ino == entry.attr.ino && attr.attr.size == 5);
    CHECK(ask(FUSE_MKDIR, ROOT_INO, &wanted, sizeof wanted.in, sizeof wanted).error == 0);
    CHECK(buffers.header->ring_ent_in_out.payload_sz == sizeof wanted);
    CHECK(memcmp(buffers.payload, &wanted, sizeof wanted) == 0);
    node_forget(server.tree, entry.nodeid, 1);
}

static uint64_t open_file(uint64_t nodeid, uint32_t flags)
{
    struct fuse_open_in in = {.flags = flags};
    struct fuse_open_out out;

    CHECK(ask(FUSE_OPEN, nodeid, &in, sizeof in, sizeof in).error == 0);
    memcpy(&out, buffers.payload, sizeof out);
    return out.fh;
}

/* The largest there are; and a file with the set-uid bit, whose removal is asked for in between. */
static void test_data(int dir)
{
    struct {
        struct fuse_write_in in;
        char data[WIRE_DATA];
    } *w = calloc(1, sizeof *w);
    struct fuse_entry_out entry = look_up("file");
    uint64_t fh = open_file(entry.nodeid, O_RDWR);
    struct fuse_read_in read_in = {.fh = fh, .size = WIRE_DATA};
    struct fuse_release_in release = {.fh = fh};

    CHECK(w);
    for (size_t i = 0; i < sizeof w->data; i++)
        w->data[i] = (char)(i * 7 + i / 4096);
    w->in = (struct fuse_write_in){
        .fh = fh, .size = sizeof w->data, .write_flags = FUSE_WRITE_KILL_SUIDGID};
    CHECK(fchmodat(dir, "file", 04755, 0) == 0);
    CHECK(ask(FUSE_WRITE, entry.nodeid, w, sizeof w->in, sizeof *w).error == 0);
    CHECK(killed == 1);
    CHECK(ask(FUSE_READ, entry.nodeid, &read_in, sizeof read_in, sizeof read_in).error == 0);
    CHECK(buffers.header->ring_ent_in_out.payload_sz == sizeof w->data);
    CHECK(memcmp(buffers.payload, w->data, sizeof w->data) == 0);
    CHECK(ask(FUSE_RELEASE, entry.nodeid, &release, sizeof release, sizeof release).error == 0);
    CHECK(ask(FUSE_READ, entry.nodeid, &read_in, sizeof read_in, sizeof read_in).error == -EBADF);
    node_forget(server.tree, entry.nodeid, 1);
    free(w);
}

static void test_malformed(void)
{
    struct fuse_write_in wide = {.fh = 1, .size = 1 << 30};
    struct fuse_in_header *head = (void *)buffers.header->in_out;
    struct fuse_out_header *answer = (void *)buffers.header->in_out;
    static const struct {
        uint32_t len, payload;
    } lies[] = {{39, 0}, {0, 0}, {40, 1}, {40 + 129, 0}, {40, UINT32_MAX}, {UINT32_MAX, 5}};

    CHECK(ask(FUSE_LOOKUP, ROOT_INO, "abc", 0, 3).error == -EINVAL);
    CHECK(ask(FUSE_LOOKUP, ROOT_INO, "", 0, 0).error == -EINVAL);
    CHECK(ask(FUSE_READ, ROOT_INO, "12345678", 8, 8).error == -EINVAL);
    CHECK(ask(FUSE_OPEN, ROOT_INO, "1234", 4, 4).error == -EIO);
    CHECK(ask(FUSE_WRITE, ROOT_INO, &wide, sizeof wide, sizeof wide).error == -EINVAL);
    CHECK(ask(4096, ROOT_INO, "", 0, 0).error == -ENOSYS);
    CHECK(ask(FUSE_NOTIFY_REPLY, ROOT_INO, "", 0, 0).error == 0);
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        *head = (struct fuse_in_header){.len = lies[i].len, .opcode = FUSE_GETATTR, .unique = 2};
        buffers.header->ring_ent_in_out.payload_sz = lies[i].payload;
        ring_buffers_serve(&server, &buffers);
        CHECK(answer->error == -EIO && answer->unique == 2);
        CHECK(buffers.header->ring_ent_in_out.payload_sz == 0);
    }
}

/* True: io_uring may be used here. */
static bool test_ring(void)
{
    struct io_uring_cqe result;
    struct ring r;
    errint_t err = ring_open(&r);

    if (err == -EPERM || err == -ENOSYS || err == -EINVAL)
        return false;
    CHECK(err == 0 && ring_enable(&r) == 0);
    CHECK(!ring_result(&r, &result));
    CHECK(ring_enter(&r, true, 1) == -ETIME);
    for (uint64_t i = 1; i < 100; i++) {
        struct io_uring_sqe *command = ring_command(&r);

        command->opcode = IORING_OP_NOP;
        command->user_data = i;
        CHECK(ring_enter(&r, i % 2 == 0, 0) == 0);
        CHECK(ring_result(&r, &result) && result.user_data == i && result.res == 0);
        CHECK(!ring_result(&r, &result));
    }
    ring_close(&r);
    ring_close(&r);
    return true;
}

int main(void)
{
    struct tree_options options = BARE;
    char base[] = "unionfs-uring-XXXXXX";
    struct layer layer = {0};
    struct stat st;
    int fd;

    CHECK(mkdtemp(base));
    layer.fd = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fstat(layer.fd, &st) == 0);
    layer.dev = st.st_dev;
    fd = openat(layer.fd, "file", O_CREAT | O_WRONLY, 0600);
    CHECK(write(fd, "12345", 5) == 5 && close(fd) == 0);
    options.has_upper = true;
    CHECK(tree_new(&layer, 1, &options, &server.tree) == 0);
    server.options = (struct engine_options){
        .statfs_fd = layer.fd, .only_uid = -1, .call = call, .arg = &server};
    CHECK(ring_buffers_new(&buffers) == 0);
    test_names();
    test_data(layer.fd);
    test_malformed();
    if (!test_ring())
        (void)fprintf(stderr, "io_uring may not be used here: left out\n");
    ring_buffers_free(&buffers);
    CHECK(server.tree->node_count == 1);
    tree_free(server.tree);
    (void)close(layer.fd);
    return 0;
}
