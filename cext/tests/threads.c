/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The node table under load: threads that look, list, read and forget, while one changes the upper
 * and tells the table of it, as the operations do. Run under ASan, UBSan and TSan (Makefile). What
 * is found may be old or new, but never an error that a program could not have met on a plain
 * directory; in the end the table knows the root only. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

#include "../engine.h"
#include "../xattrs.h"
#include "bare.h"
#include "check.h"

enum { DIRS = 6, FILES = 12, READERS = 3 };

static struct tree *tree;
static struct server server;
static int lower_fd, upper_fd;
static bool stop; /* atomically */
static long rounds = 3000;
/* As the kernel does: names of a directory are looked up together, and changed alone. */
static pthread_rwlock_t root_lock = PTHREAD_RWLOCK_INITIALIZER;
static pthread_rwlock_t dir_locks[DIRS];

static unsigned next_random(unsigned *seed)
{
    *seed = *seed * 1103515245U + 12345U;
    return *seed >> 16;
}

static void dir_name(char out[static 32], unsigned i)
{
    (void)snprintf(out, 32, "dir%u", i % DIRS);
}

static void file_name(char out[static 32], unsigned i)
{
    (void)snprintf(out, 32, "file%u", i % FILES);
}

/* ESTALE: forgotten by another thread between two calls, which the kernel would not do. */
static bool expected(errint_t err)
{
    return err == 0 || err == -ENOENT || err == -ESTALE || err == -ENOTDIR;
}

static int count_entry(void *arg, const struct dirent_out *entry)
{
    unsigned *count = arg;

    CHECK(strlen(entry->name) > 0);
    return ++*count > 500;
}

/* As the kernel asks it: the first who opens a lower file is given its pages ahead. */
static errint_t open_by_request(uint64_t ino)
{
    static _Thread_local _Alignas(8) char out[128 * 1024];
    struct fuse_in_header head = {.opcode = FUSE_OPEN, .nodeid = ino};
    struct fuse_open_in in = {.flags = O_RDONLY};
    struct request r = {.head = &head, .body = (const char *)&in, .len = sizeof in};
    const struct fuse_out_header *answer = (const void *)out;
    struct fuse_open_out opened;

    CHECK(serve(&server, &r, out) >= sizeof *answer);
    if (answer->error == 0) {
        memcpy(&opened, answer + 1, sizeof opened);
        file_release(tree, opened.fh);
    }
    return answer->error;
}

static void look_at_file(uint64_t ino, unsigned choice)
{
    struct stat st;
    char *list = NULL;
    size_t len;
    uint64_t fh;
    errint_t err = 0;

    switch (choice % 5) {
    case 0: {
        struct node *n = node_get(tree, ino);

        if (n) {
            err = node_attr(tree, n, &st);
            node_put(tree, n);
        }
        break;
    }
    case 1:
        err = file_open(tree, ino, O_RDONLY, &fh);
        if (err == 0) {
            struct file *f = file_get(tree, fh);
            char buf[16];

            CHECK(f);
            CHECK(pread(f->fd, buf, sizeof buf, 0) == 5);
            CHECK(memcmp(buf, "bytes", 5) == 0);
            file_put(tree, f);
            file_release(tree, fh);
        }
        break;
    case 2:
        err = xattr_list(tree, ino, true, &list, &len);
        if (err == 0)
            free(list);
        break;
    case 3:
        err = open_by_request(ino);
        break;
    default: {
        struct origin origin;

        err = origin_of(tree, ino, &origin);
        break;
    }
    }
    if (!expected(err))
        (void)fprintf(stderr, "look %u: %s\n", choice % 5, strerror(-err));
    CHECK(expected(err));
}

static void *reader(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    char name[32];

    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        unsigned which = next_random(&seed) % DIRS;
        struct stat dir, file;
        struct entry entry;
        errint_t err;

        dir_name(name, which);
        pthread_rwlock_rdlock(&root_lock);
        err = tree_lookup(tree, ROOT_INO, name, &dir);
        pthread_rwlock_unlock(&root_lock);
        CHECK(expected(err));
        if (err < 0)
            continue;
        file_name(name, next_random(&seed));
        pthread_rwlock_rdlock(&dir_locks[which]);
        err = tree_lookup(tree, dir.st_ino, name, &file);
        pthread_rwlock_unlock(&dir_locks[which]);
        CHECK(expected(err));
        if (err == 0) {
            look_at_file(file.st_ino, next_random(&seed));
            node_forget(tree, file.st_ino, 1);
        }
        pthread_rwlock_rdlock(&dir_locks[which]);
        if (next_random(&seed) % 4 == 0)
            CHECK(expected(tree_entry(tree, dir.st_ino, name, &entry)));
        if (next_random(&seed) % 8 == 0) {
            uint64_t dh;
            bool keep;

            if (dir_open(tree, dir.st_ino, &dh, &keep) == 0) {
                unsigned count = 0;

                CHECK(expected(dir_read(tree, dh, 0, count_entry, &count)));
                dir_release(tree, dh);
            }
        }
        pthread_rwlock_unlock(&dir_locks[which]);
        node_forget(tree, dir.st_ino, 1);
    }
    return NULL;
}

static void write_file(int dirfd, const char *name)
{
    cleanup_fd int fd = openat(dirfd, name, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);

    CHECK(fd >= 0);
    CHECK(write(fd, "bytes", 5) == 5);
}

/* The upper's directory of the union's `dir`, copied up if need be. */
static int upper_dir(uint64_t ino, const char *dir)
{
    struct copied_up c = {.ino = ino, .parent = ROOT_INO, .name = dir, .orphan_fd = -1};

    if (mkdirat(upper_fd, dir, 0755) == 0)
        CHECK(tree_copied_up(tree, &c) == 0);
    else
        CHECK(errno == EEXIST);
    int fd = openat(upper_fd, dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static void copy_up(int dirfd, uint64_t parent, uint64_t ino, const char *name)
{
    struct copied_up c = {.ino = ino, .parent = parent, .name = name, .orphan_fd = -1};
    struct keyhold hold = {.keys = {ino}};

    keys_take(&tree->copying, &hold);
    write_file(dirfd, ".temporary");
    if (renameat2(dirfd, ".temporary", dirfd, name, RENAME_NOREPLACE) == 0)
        CHECK(tree_copied_up(tree, &c) == 0);
    else
        CHECK(unlinkat(dirfd, ".temporary", 0) == 0);
    keys_give(&tree->copying, &hold);
}

static void remove_name(int dirfd, uint64_t parent, const char *name, const struct entry *entry)
{
    errint_t err = tree_prepare_unlink(tree, parent, name);

    CHECK(err == 0);
    if (entry->upper == UPPER_ENTRY)
        CHECK(unlinkat(dirfd, name, 0) == 0);
    if (entry->lower && entry->upper != UPPER_WHITEOUT)
        CHECK(mknodat(dirfd, name, S_IFCHR, 0) == 0);
    CHECK(tree_unlinked(tree, parent, name) == 0);
}

static void move_name(int dirfd, uint64_t parent, const char *name, const struct entry *entry,
                      const char *new_name)
{
    struct entry target;

    CHECK(tree_entry(tree, parent, new_name, &target) == 0);
    if (target.ino == entry->ino)
        return;
    CHECK(tree_prepare_unlink(tree, parent, new_name) == 0);
    CHECK(renameat2(dirfd, name, dirfd, new_name, entry->lower ? RENAME_WHITEOUT : 0) == 0);
    CHECK(tree_renamed(tree, parent, name, parent, new_name, false) == 0);
}

static void change(unsigned *seed)
{
    unsigned which = next_random(seed) % DIRS;
    char dir[32], name[32], new_name[32];
    struct stat st, file;
    struct entry entry;

    dir_name(dir, which);
    file_name(name, next_random(seed));
    file_name(new_name, next_random(seed));
    CHECK(tree_lookup(tree, ROOT_INO, dir, &st) == 0);
    cleanup_fd int dirfd = upper_dir(st.st_ino, dir);
    pthread_rwlock_wrlock(&dir_locks[which]);
    if (tree_lookup(tree, st.st_ino, name, &file) < 0) {
        CHECK(tree_entry(tree, st.st_ino, name, &entry) == 0);
        write_file(dirfd, ".temporary");
        CHECK(renameat(dirfd, ".temporary", dirfd, name) == 0);
    } else {
        CHECK(tree_entry(tree, st.st_ino, name, &entry) == 0);
        if (entry.upper != UPPER_ENTRY) {
            copy_up(dirfd, st.st_ino, entry.ino, name);
            entry.upper = UPPER_ENTRY;
        }
        if (next_random(seed) % 2)
            remove_name(dirfd, st.st_ino, name, &entry);
        else
            move_name(dirfd, st.st_ino, name, &entry, new_name);
        node_forget(tree, file.st_ino, 1);
    }
    pthread_rwlock_unlock(&dir_locks[which]);
    node_forget(tree, st.st_ino, 1);
}

/* A directory moves: its real directory in the upper and all that hangs on it. */
static void move_directory(unsigned *seed)
{
    char dir[32];
    struct stat st;
    struct entry entry;

    dir_name(dir, next_random(seed));
    CHECK(tree_lookup(tree, ROOT_INO, dir, &st) == 0);
    cleanup_fd int dirfd = upper_dir(st.st_ino, dir);
    pthread_rwlock_wrlock(&root_lock);
    CHECK(tree_entry(tree, ROOT_INO, dir, &entry) == 0);
    CHECK(tree_set_redirect(tree, st.st_ino, "/nowhere") == 0);
    CHECK(renameat2(upper_fd, dir, upper_fd, "away", RENAME_WHITEOUT) == 0);
    CHECK(tree_renamed(tree, ROOT_INO, dir, ROOT_INO, "away", false) == 0);
    CHECK(renameat2(upper_fd, "away", upper_fd, dir, RENAME_EXCHANGE) == 0);
    CHECK(unlinkat(upper_fd, "away", 0) == 0);
    CHECK(tree_renamed(tree, ROOT_INO, "away", ROOT_INO, dir, false) == 0);
    pthread_rwlock_unlock(&root_lock);
    node_forget(tree, st.st_ino, 1);
}

static void fill_lower(void)
{
    char name[32];

    for (unsigned d = 0; d < DIRS; d++) {
        dir_name(name, d);
        CHECK(mkdirat(lower_fd, name, 0755) == 0);
        cleanup_fd int fd = openat(lower_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        for (unsigned f = 0; f < FILES; f++) {
            file_name(name, f);
            write_file(fd, name);
        }
    }
}

static void run(void)
{
    struct layer layers[2] = {{.fd = upper_fd}, {.fd = lower_fd}};
    struct tree_options options = BARE;
    pthread_t threads[READERS];
    unsigned seed = 1;
    struct stat st;

    for (int i = 0; i < DIRS; i++)
        CHECK(pthread_rwlock_init(&dir_locks[i], NULL) == 0);
    for (int i = 0; i < 2; i++) {
        CHECK(fstat(layers[i].fd, &st) == 0);
        layers[i].dev = st.st_dev;
    }
    options.has_upper = true;
    CHECK(tree_new(layers, 2, &options, &tree) == 0);
    server.tree = tree;
    server.options = (struct engine_options){
        .device = open("/dev/null", O_WRONLY | O_CLOEXEC), .keep_cache = true, .only_uid = -1};
    CHECK(server.options.device >= 0);
    for (uintptr_t i = 0; i < READERS; i++)
        CHECK(pthread_create(&threads[i], NULL, reader, (void *)(i + 1)) == 0);
    for (long i = 0; i < rounds; i++) {
        change(&seed);
        if (i % 16 == 0)
            move_directory(&seed);
    }
    __atomic_store_n(&stop, true, __ATOMIC_RELAXED);
    for (int i = 0; i < READERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(tree->node_count == 1);
    CHECK(tree->name_count == 0);
    tree_shut(tree);
    tree_free(tree);
    (void)close(server.options.device);
}

int main(int argc, char **argv)
{
    char base[] = "unionfs-threads-XXXXXX";

    if (argc > 1)
        rounds = strtol(argv[1], NULL, 10);
    CHECK(mkdtemp(base));
    cleanup_fd int base_fd = open(base, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(mkdirat(base_fd, "lower", 0755) == 0);
    CHECK(mkdirat(base_fd, "upper", 0755) == 0);
    lower_fd = openat(base_fd, "lower", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    upper_fd = openat(base_fd, "upper", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    fill_lower();
    run();
    (void)close(lower_fd);
    (void)close(upper_fd);
    return 0;
}
