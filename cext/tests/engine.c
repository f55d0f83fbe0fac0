/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The engine with a socket in the device's place: it answers several askers at once, goes on while
 * requests are stuck, refuses what is malformed, and ends. Run under ASan, UBSan and TSan. */
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>

#include "../engine.h"
#include "../flags.h"
#include "bare.h"
#include "check.h"

enum { ASKERS = 4, STUCK = 60, PATIENCE_MS = 30000, SMALL = 9000, BUSY = 4 };

static struct tree *tree;
static struct engine *engine;
static int kernel; /* our end of the device */
static long rounds = 3000;
static sem_t stuck, go_on;
static _Atomic uint64_t next_unique = 1;

static uint64_t ask_of(uint64_t nodeid, uint32_t opcode, const void *body, size_t len)
{
    char buffer[8192];
    struct fuse_in_header head = {.len = (uint32_t)(sizeof head + len),
                                  .opcode = opcode,
                                  .unique = atomic_fetch_add(&next_unique, 1),
                                  .nodeid = nodeid};

    memcpy(buffer, &head, sizeof head);
    memcpy(buffer + sizeof head, body, len);
    CHECK(send(kernel, buffer, head.len, 0) == (ssize_t)head.len);
    return head.unique;
}

static uint64_t ask(uint32_t opcode, const void *body, size_t len)
{
    return ask_of(ROOT_INO, opcode, body, len);
}

static struct fuse_out_header answer(char *data, size_t size)
{
    struct pollfd p = {.fd = kernel, .events = POLLIN};
    char buffer[70000];
    struct fuse_out_header head;
    ssize_t n;

    CHECK(poll(&p, 1, PATIENCE_MS) == 1);
    n = recv(kernel, buffer, sizeof buffer, 0);
    CHECK(n >= (ssize_t)sizeof head);
    memcpy(&head, buffer, sizeof head);
    CHECK(head.len == n);
    if (data && (size_t)n - sizeof head <= size)
        memcpy(data, buffer + sizeof head, (size_t)n - sizeof head);
    return head;
}

/* One at a time, so that the next comes soon after the last answer. */
static void ping(long times)
{
    for (long i = 0; i < times; i++) {
        uint64_t unique = ask(FUSE_GETATTR, "", 0);

        CHECK(answer(NULL, 0).unique == unique);
    }
}

/* UNLINK waits until it is let go; MKDIR is answered with what it was asked. */
static ssize_t call(void *arg, const struct request *r, char *out, size_t cap)
{
    CHECK(arg == &tree);
    if (r->head->opcode == FUSE_UNLINK) {
        CHECK(sem_post(&stuck) == 0);
        while (sem_wait(&go_on) < 0)
            CHECK(errno == EINTR);
        return -ENOTEMPTY;
    }
    CHECK(r->len <= cap);
    memcpy(out, r->body, r->len);
    return (ssize_t)r->len;
}

static void start(int device, bool flush)
{
    struct engine_options options = {.device = device,
                                     .statfs_fd = tree->layers[0].fd,
                                     .valid_ns = 1500000000,
                                     .keep_cache = true,
                                     .only_uid = -1,
                                     .flush = flush,
                                     .call = call,
                                     .arg = &tree};

    CHECK(engine_start(tree, &options, &engine) == 0);
}

static void *asker(void *arg)
{
    unsigned which = (unsigned)(uintptr_t)arg;
    struct fuse_mkdir_in mkdir_in = {.mode = 0755};
    char body[sizeof mkdir_in + 2];

    memcpy(body, &mkdir_in, sizeof mkdir_in);
    memcpy(body + sizeof mkdir_in, "d", 2);
    for (long i = 0; i < rounds; i++) {
        switch ((which + (unsigned)i) % 4) {
        case 0:
            (void)ask(FUSE_LOOKUP, "file", 5);
            break;
        case 1:
            (void)ask(FUSE_GETATTR, "", 0);
            break;
        case 2:
            (void)ask(FUSE_STATFS, "", 0);
            break;
        default:
            (void)ask(FUSE_MKDIR, body, sizeof body);
        }
    }
    return NULL;
}

static void test_many_askers(void)
{
    pthread_t threads[ASKERS];
    uint64_t all[WIRE_OPCODES], called[WIRE_OPCODES], sum = 0;
    struct fuse_forget_in forget = {.nlookup = 0};
    struct fuse_entry_out entry = {0};
    char data[4096];

    for (uintptr_t i = 0; i < ASKERS; i++)
        CHECK(pthread_create(&threads[i], NULL, asker, (void *)i) == 0);
    for (long i = 0; i < ASKERS * rounds; i++) {
        struct fuse_out_header head = answer(data, sizeof data);

        CHECK(head.error == 0);
        if (head.len == sizeof head + sizeof entry) {
            memcpy(&entry, data, sizeof entry);
            forget.nlookup++;
        }
    }
    for (int i = 0; i < ASKERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    engine_counts(engine, all, called);
    for (int i = 0; i < WIRE_OPCODES; i++)
        sum += all[i];
    CHECK(sum == (uint64_t)(ASKERS * rounds));
    CHECK(called[FUSE_MKDIR] == all[FUSE_MKDIR] && called[FUSE_LOOKUP] == 0);
    CHECK(forget.nlookup == all[FUSE_LOOKUP]);
    node_forget(tree, entry.nodeid, forget.nlookup);
}

static void let_go(unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        CHECK(sem_post(&go_on) == 0);
}

static void test_stuck_requests_hold_up_no_other(void)
{
    for (int i = 0; i < STUCK; i++)
        (void)ask(FUSE_UNLINK, "file", 5);
    for (int i = 0; i < STUCK; i++)
        while (sem_wait(&stuck) < 0)
            CHECK(errno == EINTR);
    ping(100);
    let_go(STUCK);
    for (int i = 0; i < STUCK; i++)
        CHECK(answer(NULL, 0).error == -ENOTEMPTY);
}

static void test_malformed(void)
{
    static const struct {
        uint32_t opcode;
        const char *body;
        size_t len;
        int error;
    } cases[] = {
        {FUSE_LOOKUP, "", 0, -EINVAL},
        {FUSE_LOOKUP, "abc", 3, -EINVAL},
        {FUSE_OPEN, "1234", 4, -EINVAL},
        {FUSE_WRITE, "", 0, -EINVAL},
        {FUSE_SETXATTR, "12345678", 8, -EINVAL},
        {63, "", 0, -ENOSYS},
        {FUSE_POLL, "", 0, -ENOSYS},
        {4096, "", 0, -ENOSYS},
        {0, "", 0, -ENOSYS},
        {FUSE_UNLINK, "no end", 6, -EINVAL},
        {FUSE_IOCTL, "1234", 4, -EINVAL},
        {FUSE_TMPFILE, "1234", 4, -EINVAL},
        {FUSE_SYNCFS, "1234", 4, -EINVAL},
        {WIRE_COPY_FILE_RANGE_64, "1234", 4, -EINVAL},
        {WIRE_STATX, "1234", 4, -EINVAL},
    };
    struct fuse_in_header lying = {.len = 8000, .opcode = FUSE_GETATTR, .nodeid = ROOT_INO};
    struct fuse_write_in wide = {.fh = 1, .size = 1 << 30};
    struct fuse_read_in read_in = {.fh = 77, .size = 1 << 30};

    CHECK(send(kernel, &lying, sizeof lying, 0) == sizeof lying);
    CHECK(send(kernel, "short", 5, 0) == 5);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t unique = ask(cases[i].opcode, cases[i].body, cases[i].len);
        struct fuse_out_header head = answer(NULL, 0);

        CHECK(head.unique == unique && head.error == cases[i].error);
    }
    (void)ask(FUSE_WRITE, &wide, sizeof wide);
    CHECK(answer(NULL, 0).error == -EINVAL);
    (void)ask(FUSE_READ, &read_in, sizeof read_in);
    CHECK(answer(NULL, 0).error == -EINVAL);
    read_in.size = 4096;
    (void)ask(FUSE_READ, &read_in, sizeof read_in);
    CHECK(answer(NULL, 0).error == -EBADF);
    (void)ask(FUSE_READDIRPLUS, &read_in, sizeof read_in);
    CHECK(answer(NULL, 0).error == -EBADF);
}

static void test_statx(void)
{
    struct wire_statx_in in = {.sx_mask = STATX_BTIME};
    struct wire_statx_out out;
    struct statx wanted;

    CHECK(statx(tree->layers[0].fd, "", AT_EMPTY_PATH, STATX_BTIME | STATX_BASIC_STATS, &wanted) ==
          0);
    (void)ask(WIRE_STATX, &in, sizeof in);
    CHECK(answer((char *)&out, sizeof out).error == 0);
    CHECK(out.attr_valid == 1 && out.attr_valid_nsec == 500000000);
    CHECK(out.stat.stx_mode == wanted.stx_mode && out.stat.stx_ino == ROOT_INO);
    CHECK(out.stat.stx_mtime.tv_nsec == wanted.stx_mtime.tv_nsec);
    CHECK((out.stat.stx_mask & STATX_BTIME) == (wanted.stx_mask & STATX_BTIME));
    CHECK(out.stat.stx_btime.tv_nsec == wanted.stx_btime.tv_nsec);
}

static void test_syncfs(void)
{
    struct fuse_syncfs_in in = {0};

    (void)ask(FUSE_SYNCFS, &in, sizeof in);
    CHECK(answer(NULL, 0).error == 0);
}

static int32_t ask_ioctl(unsigned long cmd, uint64_t arg, uint32_t in_size, uint32_t out_size)
{
    struct {
        struct fuse_ioctl_in in;
        char data[4];
    } body = {.in = {.cmd = (uint32_t)cmd, .arg = arg, .in_size = in_size, .out_size = out_size}};

    (void)ask(FUSE_IOCTL, &body, sizeof body);
    return answer(NULL, 0).error;
}

static void test_ioctl(void)
{
    struct {
        struct fuse_ioctl_in in;
        uint32_t flags;
    } body = {.in = {.cmd = FS_IOC_SETFLAGS, .in_size = 4}};
    struct fuse_out_header notice;
    uint64_t unique;

    CHECK(ask_ioctl(0x5401, 0, 0, 0) == -ENOTTY); /* TCGETS */
    CHECK(ask_ioctl(FS_IOC_GETFLAGS, 0, 0, 3) == -EINVAL);
    CHECK(ask_ioctl(FS_IOC_FSGETXATTR, 0, 0, 4) == -EINVAL);
    CHECK(ask_ioctl(FS_IOC_SETFLAGS, 0, 3, 0) == -EINVAL);
    CHECK(ask_ioctl(FS_IOC_SETFLAGS, 0, 9, 0) == -EINVAL);
    CHECK(ask_ioctl(FS_IOC_SETFLAGS, 0, UINT32_MAX, 0) == -EINVAL);
    CHECK(ask_ioctl(FS_IOC_FSSETXATTR, 0, 4, 0) == -EINVAL);
    CHECK(ask_ioctl(FS_IOC_SETFLAGS, 4096, 4, 0) == -ENOTTY); /* nobody has checked it */
    unique = ask(FUSE_IOCTL, &body, sizeof body);
    notice = answer(NULL, 0);
    CHECK(notice.unique == 0 && notice.error == FUSE_NOTIFY_INVAL_INODE);
    CHECK(answer(NULL, 0).unique == unique);
}

/* The number of the request; nobody waits for the answer. */
static uint64_t ask_hold(uint32_t seconds, uint32_t ticket, bool begins)
{
    struct {
        struct fuse_ioctl_in in;
        struct hold_wish wish;
    } body = {.in = {.cmd = (uint32_t)UNIONFS_IOC_HOLD, .in_size = sizeof(struct hold_wish)},
              .wish = {seconds, ticket, begins}};

    return ask(FUSE_IOCTL, &body, sizeof body);
}

static int hold_error(uint32_t seconds, uint32_t ticket, bool begins)
{
    uint64_t unique = ask_hold(seconds, ticket, begins);
    struct fuse_out_header head = answer(NULL, 0);

    CHECK(head.unique == unique);
    return head.error;
}

static uint64_t ask_mkdir(void)
{
    char body[sizeof(struct fuse_mkdir_in) + 2] = {0};

    body[sizeof(struct fuse_mkdir_in)] = 'd';
    return ask(FUSE_MKDIR, body, sizeof body);
}

/* Two answers, in any order. */
static void both(uint64_t one, int error, uint64_t other)
{
    for (int i = 0; i < 2; i++) {
        struct fuse_out_header head = answer(NULL, 0);

        CHECK(head.unique == one || head.unique == other);
        CHECK(head.error == (head.unique == one ? error : 0));
    }
}

static void test_changes_are_held_up(void)
{
    uint64_t change, hold;

    change = ask(FUSE_UNLINK, "file", 5);
    while (sem_wait(&stuck) < 0)
        CHECK(errno == EINTR);
    hold = ask_hold(PATIENCE_MS / 1000, 7, true); /* waits for what is under way */
    ping(10);
    let_go(1);
    both(change, -ENOTEMPTY, hold);
    CHECK(hold_error(1, 8, true) == -EBUSY);
    CHECK(hold_error(1, 8, false) == -ESTALE);
    change = ask_mkdir();
    ping(10); /* reading goes on */
    hold = ask_hold(0, 7, false);
    both(change, 0, hold);
    CHECK(hold_error(1, 7, false) == -ETIME);

    /* By itself, some time. */
    CHECK(hold_error(1, 9, true) == 0);
    change = ask_mkdir();
    CHECK(answer(NULL, 0).unique == change);
    CHECK(hold_error(1, 9, false) == -ETIME);

    /* Given up while it was waited for. */
    change = ask(FUSE_UNLINK, "file", 5);
    while (sem_wait(&stuck) < 0)
        CHECK(errno == EINTR);
    hold = ask_hold(PATIENCE_MS / 1000, 10, true);
    for (int error = -ESTALE; error == -ESTALE;) { /* not yet begun */
        (void)ask_hold(0, 10, false);
        error = answer(NULL, 0).error;
        CHECK(error == -ESTALE || error + answer(NULL, 0).error == -EAGAIN); /* and 0 */
    }
    let_go(1);
    CHECK(answer(NULL, 0).unique == change);
}

/* Each keeps a thread, and there are not so many. */
static void test_many_that_are_held_up(void)
{
    enum { MANY = 301 };

    CHECK(hold_error(PATIENCE_MS / 1000, 11, true) == 0);
    for (int i = 0; i < MANY; i++)
        (void)ask_mkdir();
    for (int i = 0; i < MANY; i++)
        CHECK(answer(NULL, 0).error == 0);
    CHECK(hold_error(1, 11, false) == -ETIME);
}

static uint64_t open_file(uint64_t nodeid, uint32_t flags, struct fuse_out_header *ret_notice,
                          char *ret_data, size_t size)
{
    struct fuse_open_in in = {.flags = flags};
    struct fuse_open_out out;
    uint64_t unique = ask_of(nodeid, FUSE_OPEN, &in, sizeof in);
    struct fuse_out_header head = answer(ret_data, size);

    *ret_notice = head;
    if (head.unique == 0)
        head = answer((char *)&out, sizeof out);
    else
        memcpy(&out, ret_data, sizeof out);
    CHECK(head.unique == unique && head.error == 0 && head.len == sizeof head + sizeof out);
    return out.fh;
}

static void close_file(uint64_t nodeid, uint64_t fh)
{
    struct fuse_release_in in = {.fh = fh};

    (void)ask_of(nodeid, FUSE_RELEASE, &in, sizeof in);
    CHECK(answer(NULL, 0).error == 0);
}

/* To the first who opens it, and to nobody else; before the answer. */
static void test_pages_are_given_ahead(void)
{
    static char wanted[SMALL], data[sizeof(struct fuse_notify_store_out) + SMALL];
    struct fuse_notify_store_out where;
    struct fuse_out_header notice;
    struct fuse_entry_out entry;
    cleanup_fd int fd = openat(tree->layers[0].fd, "small", O_CREAT | O_RDWR | O_CLOEXEC, 0600);

    for (size_t i = 0; i < sizeof wanted; i++)
        wanted[i] = (char)(i * 7 + i / 4096);
    CHECK(write(fd, wanted, sizeof wanted) == sizeof wanted);
    (void)ask(FUSE_LOOKUP, "small", 6);
    CHECK(answer((char *)&entry, sizeof entry).error == 0);
    close_file(entry.nodeid,
               open_file(entry.nodeid, O_RDONLY | O_DIRECT, &notice, data, sizeof data));
    CHECK(notice.unique != 0);
    close_file(entry.nodeid, open_file(entry.nodeid, O_RDONLY, &notice, data, sizeof data));
    if (notice.unique == 0) { /* in memory, as far as the file system can tell */
        memcpy(&where, data, sizeof where);
        CHECK(notice.error == FUSE_NOTIFY_STORE && where.nodeid == entry.nodeid);
        CHECK(where.offset == 0 && where.size == SMALL);
        CHECK(notice.len == sizeof notice + sizeof data);
        CHECK(memcmp(data + sizeof where, wanted, SMALL) == 0);
    } else {
        (void)fprintf(stderr, "nothing was given ahead: not known to be in memory\n");
    }
    close_file(entry.nodeid, open_file(entry.nodeid, O_RDONLY, &notice, data, sizeof data));
    CHECK(notice.unique != 0);
    node_forget(tree, entry.nodeid, 1);
    CHECK(unlinkat(tree->layers[0].fd, "small", 0) == 0);
}

static void *busy(void *arg)
{
    _Atomic bool *enough = arg;

    while (!atomic_load(enough))
        ;
    return NULL;
}

/* The next request is looked for or waited for, on a processor that others want or do not: it is
 * answered either way. */
static void test_one_after_another(int device)
{
    pthread_t threads[BUSY];
    _Atomic bool enough = false;
    cpu_set_t before, one;

    ping(rounds);
    for (int i = 0; i < BUSY; i++)
        CHECK(pthread_create(&threads[i], NULL, busy, &enough) == 0);
    ping(100);
    atomic_store(&enough, true);
    for (int i = 0; i < BUSY; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    ping(100);

    /* With one processor it is not looked for at all. */
    engine_free(engine);
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &before))
            CPU_SET(i, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    start(device, false);
    ping(100);
    engine_free(engine);
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
    start(device, false);
}

static void *free_engine(void *arg)
{
    (void)arg;
    engine_free(engine);
    return NULL;
}

/* Waits for what is in hand, and for nothing else. */
static void test_end(int device)
{
    struct pollfd p = {.fd = engine_ended_fd(engine), .events = POLLIN};
    pthread_t freeing;

    CHECK(poll(&p, 1, 0) == 0);
    engine_stop(engine);
    CHECK(poll(&p, 1, PATIENCE_MS) == 1);
    engine_free(engine);

    start(device, true);
    (void)ask(FUSE_UNLINK, "file", 5);
    while (sem_wait(&stuck) < 0)
        CHECK(errno == EINTR);
    CHECK(pthread_create(&freeing, NULL, free_engine, NULL) == 0);
    let_go(1);
    CHECK(pthread_join(freeing, NULL) == 0);
    CHECK(answer(NULL, 0).error == -ENOTEMPTY);
}

static void nothing(int number)
{
    (void)number;
}

int main(int argc, char **argv)
{
    char base[] = "unionfs-engine-XXXXXX";
    struct sigaction action = {.sa_handler = nothing}; /* not SA_RESTART: it interrupts read(2) */
    struct layer layer = {0};
    struct stat st;
    int device[2];

    if (argc > 1)
        rounds = strtol(argv[1], NULL, 10);
    CHECK(mkdtemp(base));
    layer.fd = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fstat(layer.fd, &st) == 0);
    layer.dev = st.st_dev;
    CHECK(close(openat(layer.fd, "file", O_CREAT | O_WRONLY, 0600)) == 0);
    CHECK(tree_new(&layer, 1, &BARE, &tree) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, device) == 0);
    CHECK(sem_init(&stuck, 0, 0) == 0 && sem_init(&go_on, 0, 0) == 0);
    CHECK(sigaction(SIGURG, &action, NULL) == 0);
    kernel = device[1];
    start(device[0], false);
    test_many_askers();
    test_stuck_requests_hold_up_no_other();
    test_malformed();
    test_statx();
    test_ioctl();
    test_changes_are_held_up();
    test_many_that_are_held_up();
    test_syncfs();
    test_pages_are_given_ahead();
    test_one_after_another(device[0]);
    test_end(device[0]);
    CHECK(tree->node_count == 1);
    tree_shut(tree);
    tree_free(tree);
    (void)close(device[0]);
    (void)close(device[1]);
    (void)close(layer.fd);
    return 0;
}
