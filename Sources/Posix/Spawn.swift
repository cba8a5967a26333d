// SPDX-License-Identifier: Apache-2.0
/// Starting a program that outlives its parent: a session of its own, no descriptors but a log file.
import CLinux
import Glibc

public enum Spawn {
    /// - Parameter program: a path, or a name to look up on PATH.
    /// - Returns: the process id.
    public static func detached(_ program: String, _ arguments: [String], log: String) throws(PosixError)
        -> Int32
    {
        var actions = posix_spawn_file_actions_t()
        var attributes = posix_spawnattr_t()
        posix_spawn_file_actions_init(&actions)
        posix_spawnattr_init(&attributes)
        defer {
            posix_spawn_file_actions_destroy(&actions)
            posix_spawnattr_destroy(&attributes)
        }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        let words = try plainFile(log)
        posix_spawn_file_actions_adddup2(&actions, words.number, 1)
        posix_spawn_file_actions_adddup2(&actions, words.number, 2)
        posix_spawnattr_setflags(&attributes, Int16(nw_spawn_setsid))
        var parts: [UnsafeMutablePointer<CChar>?] = ([program] + arguments).map { strdup($0) } + [nil]
        defer { for part in parts { free(part) } }
        var pid: pid_t = 0
        let code = posix_spawnp(&pid, program, &actions, &attributes, &parts, environ)
        guard code == 0 else { throw PosixError(code, "start of \(program)") }
        return pid
    }

    /// The first line that a program prints; nil if it can't be run, or ends with another status than 0.
    /// - Parameter program: a path, or a name to look up on PATH.
    public static func firstLine(of program: String, _ arguments: [String]) -> String? {
        var ends: [Int32] = [-1, -1]
        guard pipe(&ends) == 0 else { return nil }
        let reading = OwnedFD(adopting: ends[0])
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        defer { posix_spawn_file_actions_destroy(&actions) }
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        posix_spawn_file_actions_adddup2(&actions, ends[1], 1)
        posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0)
        var parts: [UnsafeMutablePointer<CChar>?] = ([program] + arguments).map { strdup($0) } + [nil]
        defer { for part in parts { free(part) } }
        var pid: pid_t = 0
        let code = posix_spawnp(&pid, program, &actions, nil, &parts, environ)
        // So that the end of what it prints is seen.
        close(ends[1])
        guard code == 0 else { return nil }
        var text: [UInt8] = []
        var buffer = [UInt8](repeating: 0, count: 4096)
        while true {
            let count = read(reading.number, &buffer, buffer.count)
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { break }
            text += buffer.prefix(count)
        }
        var status: Int32 = 0
        while waitpid(pid, &status, 0) < 0, errno == EINTR {}
        return status == 0 ? String(decoding: text.prefix { $0 != 10 }, as: UTF8.self) : nil
    }

    /// Whether a path, or a name that has no directory and is looked up, may be started.
    public static func isProgram(_ name: String) -> Bool { !name.contains("/") || access(name, X_OK) == 0 }

    /// Finds the program of this name in the directory of the running program.
    /// - Returns: nil if it is not there, or cannot be run.
    public static func beside(_ name: String) -> String? {
        let own = ownPath
        let path = own.prefix(through: own.lastIndex(of: "/") ?? own.startIndex) + name
        return own.hasPrefix("/") && access(String(path), X_OK) == 0 ? String(path) : nil
    }

    private static var ownPath: String {
        var buffer = [UInt8](repeating: 0, count: 4096)
        let length = readlink("/proc/self/exe", &buffer, buffer.count)
        return String(decoding: buffer.prefix(max(0, length)), as: UTF8.self)
    }

    /// To be appended to. Nothing that only has the name: a link elsewhere, a FIFO that would hang.
    private static func plainFile(_ path: String) throws(PosixError) -> OwnedFD {
        let flags = O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | nw_o_nofollow | nw_o_cloexec
        let file = OwnedFD(adopting: try syscall("open \(path)") { nw_open(path, flags, 0o600) })
        var status = stat()
        guard fstat(file.number, &status) == 0, status.st_mode & S_IFMT == S_IFREG, status.st_nlink == 1,
            status.st_uid == geteuid() || status.st_uid == 0
        else { throw PosixError(EEXIST, "use \(path), which is not a plain file of yours") }
        return file
    }

    /// Starts this program anew as nobody's child, with nothing of who starts it but a few variables, and ends: with
    /// status 0 when
    /// that one has said that it is ready (`tellReady`), or as it ends.
    /// - Parameters:
    ///   - arguments: without the program's name.
    ///   - isKept: of the variables of the environment.
    public static func anew(_ arguments: [String], keeping isKept: (String) -> Bool) throws(PosixError) -> Never {
        var program = ownPath
        // Replaced by an update meanwhile: the old one has no path any more.
        if access(program, X_OK) != 0 { program = "/proc/self/exe" }
        var words: [UnsafeMutablePointer<CChar>?] =
            ([CommandLine.arguments.first ?? program] + arguments).map { strdup($0) } + [nil]
        var variables: [UnsafeMutablePointer<CChar>?] = []
        var next = environ
        while let variable = next.pointee {
            let text = String(cString: variable)
            if isKept(String(text.prefix { $0 != "=" })) { variables.append(variable) }
            next += 1
        }
        variables.append(nil)
        nw_detach(program, &words, &variables)
        throw PosixError(errno, "start of \(program)")
    }

    /// To the process that has started this one (`anew`): it may end.
    public static func tellReady(on descriptor: Int32) {
        var byte: UInt8 = 1
        _ = write(descriptor, &byte, 1)
        close(descriptor)
    }

    /// The number under which the new program finds the descriptor that `anew` gives it.
    public static let readyDescriptor: Int32 = 3

    /// Waits for a child that ends by itself.
    public static func wait(for pid: Int32) {
        var status: Int32 = 0
        while waitpid(pid, &status, 0) < 0, errno == EINTR {}
    }

    /// The exit status of a child that has ended, or nil while it runs.
    public static func exitStatus(of pid: Int32) -> Int32? {
        var status: Int32 = 0
        guard waitpid(pid, &status, WNOHANG) == pid else { return nil }
        return status & 0x7F == 0 ? (status >> 8) & 0xFF : 128 + (status & 0x7F)
    }
}
